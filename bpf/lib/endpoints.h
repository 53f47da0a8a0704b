/* SPDX-License-Identifier: Dual MIT/GPL */
/* What a sockops context says of its socket. */
#ifndef SIDESTEP_ENDPOINTS_H
#define SIDESTEP_ENDPOINTS_H

#include "../maps.h"
#include "address.h"

struct endpoints {
	struct address local;
	struct address remote;
	__u16 local_port;
	__u16 remote_port;
};

static __always_inline void endpoints_of(struct bpf_sock_ops *ctx, struct endpoints *ends)
{
	if (ctx->family == AF_INET) {
		ends->local = address_of_ipv4(ctx->local_ip4);
		ends->remote = address_of_ipv4(ctx->remote_ip4);
	} else {
		/* IPv4 on an AF_INET6 socket shows as ::ffff:a.b.c.d here, which is our form. */
		ends->local.word[0] = ctx->local_ip6[0];
		ends->local.word[1] = ctx->local_ip6[1];
		ends->local.word[2] = ctx->local_ip6[2];
		ends->local.word[3] = ctx->local_ip6[3];
		ends->remote.word[0] = ctx->remote_ip6[0];
		ends->remote.word[1] = ctx->remote_ip6[1];
		ends->remote.word[2] = ctx->remote_ip6[2];
		ends->remote.word[3] = ctx->remote_ip6[3];
	}
	/* local_port is host order; remote_port is network order in 32 bits. */
	ends->local_port = ctx->local_port;
	ends->remote_port = bpf_ntohl(ctx->remote_port);
}

static __always_inline struct original_dst *original_of(struct bpf_sock_ops *ctx, enum role role)
{
	struct bpf_sock *sk = ctx->sk;
	struct original_dst *original;

	if (!sk)
		return NULL;
	original = bpf_sk_storage_get(&original_dsts, sk, NULL, 0);
	return original && original->role == role ? original : NULL;
}

#endif
