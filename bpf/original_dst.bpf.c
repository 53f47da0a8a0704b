/* SPDX-License-Identifier: Dual MIT/GPL */
/*
 * The original destination's way to the proxy:
 *
 *   connect(2)         kept with the application's socket            (outbound.bpf.c)
 *   SYN                source port is chosen: into handshakes        TCP_CONNECT_CB
 *   proxy established  out of handshakes, with the accepted socket   PASSIVE_ESTABLISHED_CB, before accept(2) returns it
 *   SO_ORIGINAL_DST    answered from there                           cgroup/getsockopt
 *
 * A steered connection brings its destination along as the accepted socket's own address. What else sockops see (listeners, passes, ports
 * of clients) is for inbound.bpf.c and source.bpf.c.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/client_ports.h"
#include "lib/decide.h"
#include "lib/endpoints.h"

static __always_inline void handshake_of_client(struct bpf_sock_ops *ctx, const struct original_dst *original, struct handshake_key *key)
{
	struct endpoints ends;

	endpoints_of(ctx, &ends);
	__builtin_memset(key, 0, sizeof(*key));
	key->netns = original->in_pod ? original->netns : 0;
	key->client = ends.local;
	key->proxy = ends.remote;
	key->client_port = ends.local_port;
	key->proxy_port = ends.remote_port;
}

static __always_inline void watch_close(struct bpf_sock_ops *ctx)
{
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void pass_of_client(const struct endpoints *ends, struct pass_key *key)
{
	key->client = ends->local;
	key->server = ends->remote;
	key->client_port = bpf_htons(ends->local_port);
	key->server_port = bpf_htons(ends->remote_port);
}

/* A connection to a pod that starts on this node: if it is not to be steered, the pod's side has to know before its SYN arrives. */
static __always_inline void note_pass(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx), server;
	struct pass pass = {.reason = REASON_INBOUND_BYPASS_NODE};
	struct pass_key key = {};
	struct endpoints ends;
	struct node *this_node;
	__u32 zero = 0;
	struct pod *pod;

	endpoints_of(ctx, &ends);
	server = pod_at(&ends.remote);
	pod = bpf_map_lookup_elem(&pods, &server);
	if (!pod)
		return;
	if (server == netns) {
		/* Its source would say so itself. */
		if (is_own_source(pod, netns, &ends.local))
			return;
		pass.reason = REASON_INBOUND_BYPASS_OWN;
		if (pod->flags & POD_KEEP_SOURCE)
			hold_client_port(netns, &ends.local, ends.local_port, FOREVER_NS);
	} else {
		this_node = bpf_map_lookup_elem(&node, &zero);
		if (!(pod->flags & POD_PASS_NODE) || !this_node || this_node->netns != netns)
			return;
	}
	pass_of_client(&ends, &key);
	if (bpf_map_update_elem(&passes, &key, &pass, BPF_ANY))
		count(server, REASON_PASS_LOST);
	watch_close(ctx);
}

static __always_inline void on_connect(struct bpf_sock_ops *ctx)
{
	struct original_dst *original = original_of(ctx, ROLE_CLIENT);
	struct original_dst handed;
	struct handshake_key key;

	if (!original) {
		note_pass(ctx);
		return;
	}
	handshake_of_client(ctx, original, &key);
	handed = *original;
	handed.role = ROLE_PROXY;
	if (bpf_map_update_elem(&handshakes, &key, &handed, BPF_ANY))
		count(original->netns, REASON_ORIGINAL_DST_LOST);

	/* To take the entry back if the proxy never gets to it. */
	watch_close(ctx);
}

/* The interface that the handshake came by, which the kernel notes with the accepted socket; 0: not known. */
static __always_inline __u32 arrival_of(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct tcp6_sock *tcp6;
	struct tcp_sock *tcp;

	if (ctx->family == AF_INET) {
		tcp = bpf_skc_to_tcp_sock(sk);
		return tcp ? tcp->inet_conn.icsk_inet.mc_index : 0;
	}
	tcp6 = bpf_skc_to_tcp6_sock(sk);
	return tcp6 ? tcp6->inet6.mcast_oif : 0;
}

/*
 * The proxy's connection under a client's address, and one of the client itself that happens to come from the port that the proxy was given: one
 * tuple, two connections. The first is tied to lo, so that the second finds the proxy; and that to where it came from, so that the first goes on.
 */
static __always_inline void tell_apart(struct bpf_sock_ops *ctx, const struct flow *flow)
{
	struct pass *pass = pass_with(flow);
	int interface = flow->interface;

	if (!pass || pass->reason != REASON_INBOUND_BYPASS_OWN)
		return;
	if (interface == LOOPBACK_IFINDEX)
		tie_to_loopback(ctx);
	else if (interface)
		bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTOIFINDEX, &interface, sizeof(interface));
}

/* Was this connection steered? The question that the way in was decided by, asked again: its answer is the same while the connection is being made. */
static __always_inline void on_accept_steered(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 netns, const struct endpoints *ends)
{
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	struct original_dst steered = {.role = ROLE_PROXY, .in_pod = 1, .netns = netns};
	struct flow flow = {.netns = netns, .protocol = IPPROTO_TCP};

	if (!pod || !(pod->flags & POD_INBOUND))
		return;
	flow.source = ends->remote;
	flow.destination = ends->local;
	flow.source_port = bpf_htons(ends->remote_port);
	flow.destination_port = bpf_htons(ends->local_port);
	flow.interface = arrival_of(ctx, sk);
	tell_apart(ctx, &flow);
	if (decide_inbound(pod, &flow) != REASON_STEERED)
		return;

	steered.address = ends->local;
	steered.port = flow.destination_port;
	if (!bpf_sk_storage_get(&original_dsts, sk, &steered, BPF_SK_STORAGE_GET_F_CREATE))
		count(netns, REASON_ORIGINAL_DST_LOST);
	if (pod->flags & POD_KEEP_SOURCE && is_given_out(ends->remote_port)) {
		hold_client_port(netns, &ends->remote, ends->remote_port, FOREVER_NS);
		watch_close(ctx);
	}
}

static __always_inline void on_accept(struct bpf_sock_ops *ctx)
{
	struct original_dst *handed, *original;
	struct handshake_key key = {};
	struct bpf_sock *sk = ctx->sk;
	struct endpoints ends;

	if (!sk)
		return;
	/* Its identity, for the day when it is paired. */
	bpf_get_socket_cookie(ctx);
	endpoints_of(ctx, &ends);
	key.netns = bpf_get_netns_cookie(ctx);
	key.client = ends.remote;
	key.proxy = ends.local;
	key.client_port = ends.remote_port;
	key.proxy_port = ends.local_port;

	handed = bpf_map_lookup_elem(&handshakes, &key);
	if (!handed) {
		__u64 netns = key.netns;

		key.netns = 0;
		handed = bpf_map_lookup_elem(&handshakes, &key);
		if (!handed) {
			on_accept_steered(ctx, sk, netns, &ends);
			return;
		}
	}

	original = bpf_sk_storage_get(&original_dsts, sk, handed, BPF_SK_STORAGE_GET_F_CREATE);
	if (original)
		count(original->netns, REASON_ACCEPTED);
	else
		count(handed->netns, REASON_ORIGINAL_DST_LOST);
	bpf_map_delete_elem(&handshakes, &key);
}

/* A port of a client is free again when no socket of its connection is left in TIME_WAIT. */
static __always_inline void free_client_port(struct bpf_sock_ops *ctx, __u64 netns, const struct address *client, __u16 port)
{
	bool at_once = ctx->args[0] == TCP_LAST_ACK || ctx->args[0] == TCP_SYN_SENT;

	hold_client_port(netns, client, port, at_once ? 0 : bpf_ktime_get_boot_ns() + TIME_WAIT_NS);
}

static __always_inline void on_close(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pass_key key = {};
	struct endpoints ends;

	endpoints_of(ctx, &ends);
	if (original_of(ctx, ROLE_PROXY)) {
		free_client_port(ctx, netns, &ends.remote, ends.remote_port);
		return;
	}
	pass_of_client(&ends, &key);
	if (!bpf_map_delete_elem(&passes, &key) && pod_at(&ends.remote) == netns)
		free_client_port(ctx, netns, &ends.local, ends.local_port);
}

static __always_inline void on_state(struct bpf_sock_ops *ctx)
{
	struct original_dst *original;
	struct handshake_key key;

	if (ctx->args[1] != TCP_CLOSE)
		return;
	original = original_of(ctx, ROLE_CLIENT);
	if (!original) {
		on_close(ctx);
		return;
	}
	handshake_of_client(ctx, original, &key);
	bpf_map_delete_elem(&handshakes, &key);
	if (ctx->args[0] == TCP_SYN_SENT)
		count(original->netns, REASON_CONNECT_FAILED);
}

/* Runs about nine times in the life of every TCP socket of the node: the op decides before anything else. */
SEC("sockops")
int handshake(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_connect(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_accept(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		on_state(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		on_connected(ctx);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		on_round_trip(ctx);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		on_listen(ctx);
		break;
	}
	return 1;
}

/* The kernel copies no more than a page in and out of a program; for more it fails with EFAULT unless it is told to copy nothing. */
enum { SOCKOPT_COPY_MAX = 4096 };

/* Up to this size the kernel's copy is on its stack and not cleared (BPF_SOCKOPT_KERN_BUF_SIZE); above, it is zeroed. */
enum { SOCKOPT_STACK_MAX = 32 };

/*
 * As conntrack answers it (getorigdst, ipv6_getorigdst): the address only, in the family that is on the wire, and the length as the
 * caller gave it. In every other case what the kernel said stands: the program changes nothing.
 *
 * Runs for every getsockopt(2) of the node: level and option decide before anything else.
 */
SEC("cgroup/getsockopt")
int original_dst(struct bpf_sockopt *ctx)
{
	__u8 *value = ctx->optval, *end = ctx->optval_end;
	struct bpf_sock *sk = ctx->sk;
	struct original_dst *original;

	if (ctx->optlen > SOCKOPT_COPY_MAX) {
		ctx->optlen = 0;
		return 1;
	}
	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		return 1;
	if (!sk)
		return 1;
	original = bpf_sk_storage_get(&original_dsts, sk, NULL, 0);
	if (!original || original->role == ROLE_RESOLVER || is_ipv4(&original->address) != (ctx->level == SOL_IP))
		return 1;

	if (ctx->level == SOL_IP) {
		struct sockaddr_in *sin = (struct sockaddr_in *)value;

		if ((void *)(sin + 1) > (void *)end)
			return 1;
		__builtin_memset(sin, 0, sizeof(*sin));
		sin->sin_family = AF_INET;
		sin->sin_port = original->port;
		sin->sin_addr = original->address.word[3];
		value += sizeof(*sin);
	} else {
		struct sockaddr_in6 *sin6 = (struct sockaddr_in6 *)value;

		if ((void *)(sin6 + 1) > (void *)end)
			return 1;
		__builtin_memset(sin6, 0, sizeof(*sin6));
		sin6->sin6_family = AF_INET6;
		sin6->sin6_port = original->port;
		__builtin_memcpy(sin6->sin6_addr, original->address.word, sizeof(sin6->sin6_addr));
		value += sizeof(*sin6);
	}

	for (int i = sizeof(struct sockaddr_in); i < SOCKOPT_STACK_MAX; i++, value++) {
		if (value + 1 > end)
			break;
		*value = 0;
	}
	ctx->retval = 0;
	return 1;
}
