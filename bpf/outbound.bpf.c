/* SPDX-License-Identifier: Dual MIT/GPL */
/*
 * connect(2) of an enrolled pod: leave it alone, send it to the proxy, or refuse it. getpeername(2) then tells the application the
 * peer that it asked for.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/exempt.h"

/* What a cgroup/connect program returns. */
enum { REFUSE = 0, ALLOW = 1 };

static __always_inline enum reason decide(struct bpf_sock_addr *ctx, const struct pod *pod, const struct address *destination)
{
	struct prefix_key key = {.bits = 32 + 128, .policy = bpf_htonl(pod->policy), .address = *destination};
	struct prefix *prefix;

	if (has_exempt_mark(pod, ctx->sk->mark))
		return REASON_BYPASS_MARK;

	if (pod->flags & (POD_EXEMPT_UIDS | POD_EXEMPT_GIDS)) {
		struct owner owner = owner_of(ctx->sk);

		if (pod->flags & POD_EXEMPT_UIDS && is_exempt(pod->policy, EXEMPT_UID, owner.uid))
			return REASON_BYPASS_UID;
		if (pod->flags & POD_EXEMPT_GIDS && is_exempt(pod->policy, EXEMPT_GID, owner.gid))
			return REASON_BYPASS_GID;
	}

	if (pod->exempt_cgroup_levels && has_exempt_cgroup(pod))
		return REASON_BYPASS_CGROUP;

	prefix = bpf_map_lookup_elem(&prefixes, &key);
	if (prefix)
		return prefix->kind == PREFIX_LOCAL ? REASON_BYPASS_LOCAL : REASON_BYPASS_NOT_UNICAST;

	return REASON_REDIRECTED;
}

/*
 * The error that connect(2) gives. Before 5.18 a program cannot choose, and the application sees EPERM: as closed, only less clear.
 * Callers do not care about the helper's result: it fails for positive values only.
 */
static __always_inline int refuse(int error)
{
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_set_retval))
		bpf_set_retval(-error);
	return REFUSE;
}

/* The application chose a source address itself. */
static __always_inline bool is_bound(struct bpf_sock_addr *ctx, bool ipv4)
{
	struct bpf_sock *sk = ctx->sk;

	if (ipv4)
		return sk->src_ip4 != 0;
	return (sk->src_ip6[0] | sk->src_ip6[1] | sk->src_ip6[2] | sk->src_ip6[3]) != 0;
}

/*
 * A connection to loopback would come from loopback, and the proxy needs to see the pod. Port 0: the port is still chosen by connect,
 * for the whole tuple (BIND_FORCE_ADDRESS_NO_PORT), so this costs no port. The address stays bound if connect fails and the
 * application tries again with the same socket, which only shows as a source that it could have had anyway.
 */
static __always_inline int bind_source(struct bpf_sock_addr *ctx, const struct address *source)
{
	if (ctx->family == AF_INET) {
		struct sockaddr_in sin = {.sin_family = AF_INET, .sin_addr = source->word[3]};

		return bpf_bind(ctx, (struct sockaddr *)&sin, sizeof(sin));
	}

	struct sockaddr_in6 sin6 = {.sin6_family = AF_INET6};

	__builtin_memcpy(sin6.sin6_addr, source->word, sizeof(sin6.sin6_addr));
	return bpf_bind(ctx, (struct sockaddr *)&sin6, sizeof(sin6));
}

/*
 * @target: set when the caller has to rewrite the destination
 * @return what the program returns
 */
static __always_inline int capture(struct bpf_sock_addr *ctx, const struct address *destination, const struct target **target)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	bool ipv4 = is_ipv4(destination);
	struct original_dst *original;
	struct target *to;
	enum reason reason;

	if (!pod)
		return ALLOW;

	reason = decide(ctx, pod, destination);
	if (reason != REASON_REDIRECTED) {
		/* The socket may have been captured by an earlier connect that failed: its peer is now the real one. */
		bpf_sk_storage_delete(&original_dsts, ctx->sk);
		count(netns, reason);
		return ALLOW;
	}

	to = ipv4 ? &pod->target4 : &pod->target6;
	if (is_none(&to->address)) {
		/* A pod without an address of this family has no route for it either: what the stack itself would say. */
		count(netns, REASON_REFUSED_NO_PROXY);
		return refuse(ENETUNREACH);
	}

	/* As the stack says when it looks for a route out of the pod; sent to the proxy, it would never look. */
	if (ipv4 && (ctx->sk->src_ip4 & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000)) {
		count(netns, REASON_REFUSED_SOURCE);
		return refuse(EINVAL);
	}

	original = bpf_sk_storage_get(&original_dsts, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!original) {
		count(netns, REASON_REFUSED_NO_MEMORY);
		return refuse(ENOMEM);
	}
	original->address = *destination;
	original->port = ctx->user_port;
	original->in_pod = to->in_pod;
	original->role = ROLE_CLIENT;
	original->netns = netns;

	if (!is_none(&to->source) && !is_bound(ctx, ipv4) && bind_source(ctx, &to->source)) {
		count(netns, REASON_REFUSED_SOURCE);
		return refuse(EADDRNOTAVAIL);
	}

	*target = to;
	count(netns, REASON_REDIRECTED);
	return ALLOW;
}

static __always_inline bool is_tcp(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_MPTCP;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	const struct target *target = NULL;
	struct address destination;
	int verdict;

	if (!is_tcp(ctx))
		return ALLOW;

	destination = address_of_ipv4(ctx->user_ip4);
	verdict = capture(ctx, &destination, &target);
	if (target) {
		ctx->user_ip4 = target->address.word[3];
		ctx->user_port = target->port;
	}
	return verdict;
}

/* Also IPv4 from an AF_INET6 socket, which arrives as ::ffff:a.b.c.d and has to leave so. */
SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	const struct target *target = NULL;
	struct address destination;
	int verdict;

	if (!is_tcp(ctx))
		return ALLOW;

	destination.word[0] = ctx->user_ip6[0];
	destination.word[1] = ctx->user_ip6[1];
	destination.word[2] = ctx->user_ip6[2];
	destination.word[3] = ctx->user_ip6[3];
	verdict = capture(ctx, &destination, &target);
	if (target) {
		ctx->user_ip6[0] = target->address.word[0];
		ctx->user_ip6[1] = target->address.word[1];
		ctx->user_ip6[2] = target->address.word[2];
		ctx->user_ip6[3] = target->address.word[3];
		ctx->user_port = target->port;
	}
	return verdict;
}

static __always_inline struct original_dst *original_of_client(struct bpf_sock_addr *ctx)
{
	struct original_dst *original = bpf_sk_storage_get(&original_dsts, ctx->sk, NULL, 0);

	return original && original->role == ROLE_CLIENT ? original : NULL;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct original_dst *original = original_of_client(ctx);

	if (original) {
		ctx->user_ip4 = original->address.word[3];
		ctx->user_port = original->port;
	}
	return ALLOW;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct original_dst *original = original_of_client(ctx);

	if (original) {
		ctx->user_ip6[0] = original->address.word[0];
		ctx->user_ip6[1] = original->address.word[1];
		ctx->user_ip6[2] = original->address.word[2];
		ctx->user_ip6[3] = original->address.word[3];
		ctx->user_port = original->port;
	}
	return ALLOW;
}
