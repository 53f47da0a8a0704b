/* SPDX-License-Identifier: Dual MIT/GPL */
/* Who connects: what iptables' mark, owner and cgroup matches look at. */
#ifndef SIDESTEP_EXEMPT_H
#define SIDESTEP_EXEMPT_H

#include "../maps.h"
#include "kernel_types.h"

enum { CGROUP_LEVELS = 32 };

struct owner {
	__u32 uid;
	__u32 gid;
};

/*
 * The owner match looks at who made the socket, not at who connects it (net/netfilter/xt_owner.c: sk_socket->file->f_cred, fsuid and
 * fsgid). A socket without a file, MPTCP (whose file hangs on another socket) and UDP (which no helper gives the kernel's view of) are
 * taken as their current user's.
 */
static __always_inline bool read_owner(struct sock *sock, struct owner *owner)
{
	struct socket *socket = sock->sk_socket;
	struct file *file;

	if (!socket)
		return false;
	file = socket->file;
	if (!file)
		return false;
	owner->uid = file->f_cred->fsuid.val;
	owner->gid = file->f_cred->fsgid.val;
	return true;
}

static __always_inline struct owner owner_of(struct bpf_sock *sk)
{
	__u64 current = bpf_get_current_uid_gid();
	struct owner owner = {.uid = (__u32)current, .gid = (__u32)(current >> 32)};
	struct sock *sock = (struct sock *)bpf_skc_to_tcp_sock(sk);

	if (sock)
		read_owner(sock, &owner);
	return owner;
}

static __always_inline bool is_exempt(__u32 policy, enum exemption_kind kind, __u64 id)
{
	struct exemption_key key = {.policy = policy, .kind = kind, .id = id};

	return bpf_map_lookup_elem(&exemptions, &key) != NULL;
}

static __always_inline bool has_exempt_mark(const struct pod *pod, __u32 mark)
{
	for (__u32 i = 0; i < MARKS_MAX; i++)
		if (i < pod->mark_count && (mark & pod->marks[i].mask) == pod->marks[i].value)
			return true;
	return false;
}

/* The connecting task's cgroup or one above it. */
static __always_inline bool in_exempt_cgroup(const struct pod *pod)
{
	for (int level = 0; level < CGROUP_LEVELS; level++) {
		if (!(pod->exempt_cgroup_levels & (1U << level)))
			continue;
		if (is_exempt(pod->policy, EXEMPT_CGROUP, bpf_get_current_ancestor_cgroup_id(level)))
			return true;
	}
	return false;
}

#endif
