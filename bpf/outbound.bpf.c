/* SPDX-License-Identifier: Dual MIT/GPL */
/*
 * What an enrolled pod sends: leave it alone, send it to the proxy, or refuse it. connect(2) decides for TCP and for UDP sockets with
 * a peer, sendmsg(2) for UDP sockets without. getpeername(2) and recvmsg(2) then show the application the peer that it asked for.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/decide.h"
#include "lib/exempt.h"

/* What a cgroup/connect program returns. */
enum { REFUSE = 0, ALLOW = 1 };

/* Where a captured connection goes. */
struct redirection {
	struct address address;
	struct address source;         /* to be bound if the application bound none; none: nothing is bound */
	__be16 port;
	__u16 in_pod;
};

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

static __always_inline struct address bound_address(struct bpf_sock_addr *ctx, bool ipv4)
{
	struct bpf_sock *sk = ctx->sk;

	if (ipv4)
		return sk->src_ip4 ? address_of_ipv4(sk->src_ip4) : address_of_words(0, 0, 0, 0);
	return address_of_words(sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3]);
}

static __always_inline __u32 transport_of(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_MPTCP ? IPPROTO_TCP : ctx->protocol;
}

/* `destination` and the source are the caller's, as their place in the context differs. */
static __always_inline void read_flow(struct bpf_sock_addr *ctx, const struct pod *pod, __u64 netns, struct flow *flow)
{
	flow->netns = netns;
	flow->source_port = bpf_htons(ctx->sk->src_port);
	flow->destination_port = ctx->user_port;
	flow->protocol = transport_of(ctx);
	flow->mark = ctx->sk->mark;
	flow->interface = ctx->sk->bound_dev_if;
	if (pod->flags & (POD_SIDECAR | POD_EXEMPT_UIDS | POD_EXEMPT_GIDS)) {
		struct owner owner = owner_of(ctx->sk);

		flow->uid = owner.uid;
		flow->gid = owner.gid;
	}
	if (pod->exempt_cgroup_levels)
		flow->in_exempt_cgroup = in_exempt_cgroup(pod);
}

/*
 * iptables gives a source port to two destinations at once, because they differ in the destination. So do these: an address of 127/8
 * for each destination, 127.1.0.0 to 127.254.255.255, which leaves 127.0.0.0/16 to what people put there.
 */
static __always_inline struct address spread(const struct flow *flow)
{
	__u32 hash = flow->destination.word[3] ^ ((__u32)flow->destination_port * 0x9e3779b1);

	hash ^= hash >> 15;
	hash *= 0x85ebca6b;
	hash ^= hash >> 13;
	return address_of_ipv4(bpf_htonl(0x7f000000 | (1 + (hash >> 16) % 254) << 16 | (hash & 0xffff)));
}

/*
 * Only from the pod's own address: a socket that is bound to a port and no address could not be given one any more, and one that is
 * bound to an interface does not reach loopback.
 */
static __always_inline bool can_spread(const struct flow *flow)
{
	return is_ipv4(&flow->destination) && !flow->interface && (!flow->source_port || !is_none(&flow->source));
}

/* @return whether there is a way to the proxy in the destination's family */
static __always_inline bool redirection_of(const struct pod *pod, const struct flow *flow, struct decision decision, struct redirection *to)
{
	bool ipv4 = is_ipv4(&flow->destination);
	const struct target *target = ipv4 ? &pod->target4 : &pod->target6;

	if (decision.reason == REASON_REDIRECTED_DNS) {
		to->address = localhost(ipv4);
		to->port = pod->dns_port;
		to->in_pod = 1;
		/* The source that it would have had: loopback for loopback, the address itself for one of the pod's. */
		if (is_loopback(&flow->destination))
			return true;
		to->source = decision.local ? flow->destination : target->source;
		return !is_none(&to->source);
	}
	if (decision.local) {
		/*
		 * Loopback goes to localhost, where istio-validation listens and nowhere else. Of an address of the pod only the port changes, so
		 * that the source stays what the kernel takes for it.
		 */
		to->address = is_loopback(&flow->destination) ? localhost(ipv4) : flow->destination;
		to->port = decision.reason == REASON_REDIRECTED_INBOUND ? pod->inbound_port : target->port;
		to->in_pod = 1;
		return true;
	}
	to->address = target->spread && can_spread(flow) ? spread(flow) : target->address;
	to->port = target->port;
	to->in_pod = target->in_pod;
	if (is_loopback(&to->address))
		to->source = target->source;
	return !is_none(&to->address);
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
 * The proxy connects to its own pod under a client's address. The answers have to come back over lo, which the mark (and the rule that the
 * agent put into the namespace) makes them do. It must not be steered back to the proxy, nor be taken for the client itself, which may come
 * from the very same port: tied to lo, it is told from both by the interface.
 */
static __always_inline int keep_source(struct bpf_sock_addr *ctx, const struct pod *pod, const struct flow *flow)
{
	__u32 mark = (flow->mark & ~KEPT_SOURCE_MASK) | KEPT_SOURCE_MARK;
	struct pass pass = {.reason = REASON_INBOUND_BYPASS_OWN};
	struct pass_key key = {
		.client = flow->source,
		.server = flow->destination,
		.client_port = flow->source_port,
		.server_port = flow->destination_port,
	};

	if (is_none(&flow->source) || prefix_flags_of(pod->policy, &flow->source) & PREFIX_LOCAL)
		return ALLOW;
	if (flow->interface != LOOPBACK_IFINDEX && tie_to_loopback(ctx)) {
		count(flow->netns, REASON_REFUSED_SOURCE);
		return refuse(EADDRNOTAVAIL);
	}
	/* Before 5.17 sk_lookup does not know the interface and needs the note; without it, it would steer. TCP_CONNECT_CB is too late to refuse. */
	if (!bpf_core_field_exists(struct bpf_sk_lookup___arrival, ingress_ifindex) && key.client_port &&
	    bpf_map_update_elem(&passes, &key, &pass, BPF_ANY)) {
		count(flow->netns, REASON_PASS_LOST);
		return refuse(ENOMEM);
	}
	if (!bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		count(flow->netns, REASON_SOURCE_KEPT);
	return ALLOW;
}

/*
 * @to: filled in when the caller has to rewrite the destination, which `to->port` tells
 * @return what the program returns
 */
static __always_inline int capture(struct bpf_sock_addr *ctx, struct flow *flow, struct redirection *to)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	struct address bound = flow->source;
	struct original_dst *original;
	struct decision decision;

	if (!pod)
		return ALLOW;
	if (ctx->protocol == IPPROTO_UDP && (!pod->dns_port || ctx->user_port != bpf_htons(53))) {
		/* The socket may have asked a resolver before: from now on answers come from where it really sends to. */
		bpf_sk_storage_delete(&original_dsts, ctx->sk);
		return ALLOW;
	}

	resolve_unspecified(flow);
	read_flow(ctx, pod, netns, flow);
	decision = decide_outbound(pod, flow);
	if (!is_captured(decision.reason)) {
		/* The socket may have been captured by an earlier connect that failed: its peer is now the real one. */
		bpf_sk_storage_delete(&original_dsts, ctx->sk);
		count(netns, decision.reason);
		return pod->flags & POD_KEEP_SOURCE && decision.reason == REASON_BYPASS_MARK && decision.local
			? keep_source(ctx, pod, flow) : ALLOW;
	}

	if (!redirection_of(pod, flow, decision, to)) {
		to->port = 0;
		/* A pod without an address of this family has no route for it either: what the stack itself would say. */
		count(netns, REASON_REFUSED_NO_PROXY);
		return refuse(ENETUNREACH);
	}

	/* As the stack says when it looks for a route out of the pod; sent to the proxy, it would never look. */
	if (!decision.local && is_ipv4_loopback(&bound)) {
		to->port = 0;
		count(netns, REASON_REFUSED_SOURCE);
		return refuse(EINVAL);
	}

	original = bpf_sk_storage_get(&original_dsts, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!original) {
		to->port = 0;
		count(netns, REASON_REFUSED_NO_MEMORY);
		return refuse(ENOMEM);
	}
	original->address = flow->destination;
	original->port = flow->destination_port;
	original->in_pod = to->in_pod;
	original->role = flow->protocol == IPPROTO_UDP ? ROLE_RESOLVER : ROLE_CLIENT;
	original->netns = netns;
	original->dns_port = pod->dns_port;
	count(netns, decision.reason);
	return ALLOW;
}

/* For connect(2), where the source is the socket's. */
static __always_inline int bind_before_connect(struct bpf_sock_addr *ctx, struct flow *flow, struct redirection *to)
{
	if (is_none(&to->source) || !is_none(&flow->source) || !bind_source(ctx, &to->source))
		return ALLOW;
	/* A UDP socket that has a port already: the DNS proxy sees loopback as its peer. */
	if (flow->protocol == IPPROTO_UDP)
		return ALLOW;
	to->port = 0;
	count(flow->netns, REASON_REFUSED_SOURCE);
	return refuse(EADDRNOTAVAIL);
}

static __always_inline bool is_ours(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_UDP || ctx->protocol == IPPROTO_MPTCP;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct redirection to = {};
	struct flow flow = {};
	int verdict;

	if (!is_ours(ctx))
		return ALLOW;

	flow.destination = address_of_ipv4(ctx->user_ip4);
	flow.source = bound_address(ctx, true);
	verdict = capture(ctx, &flow, &to);
	if (to.port)
		verdict = bind_before_connect(ctx, &flow, &to);
	if (to.port) {
		ctx->user_ip4 = to.address.word[3];
		ctx->user_port = to.port;
	}
	return verdict;
}

/* Also IPv4 from an AF_INET6 socket, which arrives as ::ffff:a.b.c.d and has to leave so. */
SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct redirection to = {};
	struct flow flow = {};
	int verdict;

	if (!is_ours(ctx))
		return ALLOW;

	flow.destination = address_of_words(ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	flow.source = bound_address(ctx, is_ipv4(&flow.destination));
	verdict = capture(ctx, &flow, &to);
	if (to.port)
		verdict = bind_before_connect(ctx, &flow, &to);
	if (to.port) {
		ctx->user_ip6[0] = to.address.word[0];
		ctx->user_ip6[1] = to.address.word[1];
		ctx->user_ip6[2] = to.address.word[2];
		ctx->user_ip6[3] = to.address.word[3];
		ctx->user_port = to.port;
	}
	return verdict;
}

/* A datagram with an address, on a UDP socket that need not have a peer. IPv4 from an AF_INET6 socket comes here too. */
SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct redirection to = {};
	struct flow flow = {};
	int verdict;

	if (ctx->protocol != IPPROTO_UDP || ctx->user_port != bpf_htons(53))
		return ALLOW;

	flow.destination = address_of_ipv4(ctx->user_ip4);
	/* IP_PKTINFO gives a source for one datagram. */
	flow.source = ctx->msg_src_ip4 ? address_of_ipv4(ctx->msg_src_ip4) : bound_address(ctx, true);
	verdict = capture(ctx, &flow, &to);
	if (to.port) {
		ctx->user_ip4 = to.address.word[3];
		ctx->user_port = to.port;
		if (is_none(&flow.source) && !is_none(&to.source))
			ctx->msg_src_ip4 = to.source.word[3];
	}
	return verdict;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct redirection to = {};
	struct flow flow = {};
	int verdict;

	if (ctx->protocol != IPPROTO_UDP || ctx->user_port != bpf_htons(53))
		return ALLOW;

	flow.destination = address_of_words(ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	flow.source = address_of_words(ctx->msg_src_ip6[0], ctx->msg_src_ip6[1], ctx->msg_src_ip6[2], ctx->msg_src_ip6[3]);
	if (is_none(&flow.source))
		flow.source = bound_address(ctx, false);
	verdict = capture(ctx, &flow, &to);
	if (to.port) {
		ctx->user_ip6[0] = to.address.word[0];
		ctx->user_ip6[1] = to.address.word[1];
		ctx->user_ip6[2] = to.address.word[2];
		ctx->user_ip6[3] = to.address.word[3];
		ctx->user_port = to.port;
		if (is_none(&flow.source) && !is_none(&to.source)) {
			ctx->msg_src_ip6[0] = to.source.word[0];
			ctx->msg_src_ip6[1] = to.source.word[1];
			ctx->msg_src_ip6[2] = to.source.word[2];
			ctx->msg_src_ip6[3] = to.source.word[3];
		}
	}
	return verdict;
}

/* The resolver that the application asked, if the peer or sender is the DNS proxy. */
static __always_inline bool is_dns_proxy(struct bpf_sock_addr *ctx, const struct original_dst *original, const struct address *seen)
{
	return original->role == ROLE_RESOLVER && original->dns_port == ctx->user_port && is_loopback(seen);
}

/* The peer that the application asked for. */
static __always_inline struct original_dst *asked_peer(struct bpf_sock_addr *ctx, const struct address *peer)
{
	struct original_dst *original = bpf_sk_storage_get(&original_dsts, ctx->sk, NULL, 0);

	return original && (original->role == ROLE_CLIENT || is_dns_proxy(ctx, original, peer)) ? original : NULL;
}

static __always_inline struct original_dst *asked_resolver(struct bpf_sock_addr *ctx, const struct address *sender)
{
	struct original_dst *original;

	if (!is_loopback(sender))
		return NULL;
	original = bpf_sk_storage_get(&original_dsts, ctx->sk, NULL, 0);
	return original && is_dns_proxy(ctx, original, sender) ? original : NULL;
}

static __always_inline void show4(struct bpf_sock_addr *ctx, const struct original_dst *original)
{
	ctx->user_ip4 = original->address.word[3];
	ctx->user_port = original->port;
}

static __always_inline void show6(struct bpf_sock_addr *ctx, const struct original_dst *original)
{
	ctx->user_ip6[0] = original->address.word[0];
	ctx->user_ip6[1] = original->address.word[1];
	ctx->user_ip6[2] = original->address.word[2];
	ctx->user_ip6[3] = original->address.word[3];
	ctx->user_port = original->port;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct address peer = address_of_ipv4(ctx->user_ip4);
	struct original_dst *original = asked_peer(ctx, &peer);

	if (original)
		show4(ctx, original);
	return ALLOW;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct address peer = address_of_words(ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	struct original_dst *original = asked_peer(ctx, &peer);

	if (original)
		show6(ctx, original);
	return ALLOW;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct address sender = address_of_ipv4(ctx->user_ip4);
	struct original_dst *original = asked_resolver(ctx, &sender);

	if (original)
		show4(ctx, original);
	return ALLOW;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct address sender = address_of_words(ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	struct original_dst *original = asked_resolver(ctx, &sender);

	if (original)
		show6(ctx, original);
	return ALLOW;
}
