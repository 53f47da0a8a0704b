/* SPDX-License-Identifier: Dual MIT/GPL */
/* The program contexts, and the helpers. */
#ifndef SIDESTEP_CONTEXT_H
#define SIDESTEP_CONTEXT_H

/*
 * clang may merge two branches that read or write a context into one access at a computed offset, which the verifier refuses
 * ("dereference of modified ctx ptr"). The attribute (clang 19) forbids that. It has to cover the contexts only: over kernel types it
 * would switch CO-RE relocation off.
 */
#pragma clang attribute push(__attribute__((preserve_static_offset)), apply_to = record)
#include <linux/bpf.h>
#pragma clang attribute pop

#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_core_read.h>

/* From headers that do not compile for the bpf target, or clash with the ones above. */
#define AF_INET 2
#define AF_INET6 10
#define SOL_SOCKET 1
#define SO_REUSEADDR 2
#define SO_BINDTODEVICE 25
#define SO_MARK 36
#define SO_BINDTOIFINDEX 62
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262
#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80
#define TCP_ESTABLISHED 1
#define TCP_SYN_SENT 2
#define TCP_CLOSE 7
#define TCP_LAST_ACK 9
#define TCP_LISTEN 10
/* Of lo in every namespace. */
#define LOOPBACK_IFINDEX 1
#define ENETUNREACH 101
#define ECONNREFUSED 111
#define ENOENT 2
#define EBUSY 16
#define ENOMEM 12
#define EEXIST 17
#define EINVAL 22
#define EOPNOTSUPP 95
#define EADDRNOTAVAIL 99

/* include/net/sock.h, uapi/linux/in.h and in6.h. */
struct sockaddr_in {
	__u16 sin_family;
	__be16 sin_port;
	__be32 sin_addr;
	__u8 sin_zero[8];
};

struct sockaddr_in6 {
	__u16 sin6_family;
	__be16 sin6_port;
	__be32 sin6_flowinfo;
	__be32 sin6_addr[4];
	__u32 sin6_scope_id;
};

/* From now on the socket sends over lo only, and gets only what comes over lo. @return 0, or a negative errno */
static __always_inline long tie_to_loopback(void *ctx)
{
	char name[] = "lo";

	return bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, name, sizeof(name));
}

#endif
