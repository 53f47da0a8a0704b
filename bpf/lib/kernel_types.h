/* SPDX-License-Identifier: Dual MIT/GPL */
/* The few kernel fields that no context shows. CO-RE moves each access to where the running kernel has it. */
#ifndef SIDESTEP_KERNEL_TYPES_H
#define SIDESTEP_KERNEL_TYPES_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	__u32 val;
} kuid_t;

typedef struct {
	__u32 val;
} kgid_t;

struct cred {
	kuid_t fsuid;
	kgid_t fsgid;
};

struct file {
	const struct cred *f_cred;
};

struct socket {
	struct file *file;
};

struct sock {
	struct socket *sk_socket;
};

#pragma clang attribute pop

#endif
