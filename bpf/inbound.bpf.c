/* SPDX-License-Identifier: Dual MIT/GPL */
/*
 * What comes to an enrolled pod from outside: steered to the proxy's listener, with its destination kept. One program for all pods; a link
 * for each namespace whose pod has something to steer.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/client_ports.h"
#include "lib/decide.h"

SEC("sk_lookup")
int inbound(struct bpf_sk_lookup *ctx)
{
	struct listener_key key = {};
	struct flow flow = {};
	enum reason reason;
	__u32 zero = 0;
	struct pod *pod;
	int step;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		flow.source = address_of_ipv4(ctx->remote_ip4);
		flow.destination = address_of_ipv4(ctx->local_ip4);
	} else {
		flow.source = address_of_words(ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3]);
		flow.destination = address_of_words(ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3]);
	}
	if (bpf_core_field_exists(struct bpf_sk_lookup___arrival, ingress_ifindex))
		flow.interface = ctx->ingress_ifindex;
	/* From outside these have no business here: nobody is known by them. */
	if (is_loopback(&flow.destination) && (!flow.interface || flow.interface == LOOPBACK_IFINDEX))
		return SK_PASS;

	flow.netns = pod_at(&flow.destination);
	pod = bpf_map_lookup_elem(&pods, &flow.netns);
	if (!pod) {
		/* The link says that this pod is captured; an address that the agent has not seen yet is no reason to let anybody past the proxy. */
		struct node *this_node = bpf_map_lookup_elem(&node, &zero);

		if (this_node)
			__sync_fetch_and_add(&this_node->unknown_addresses, 1);
		return SK_DROP;
	}

	flow.protocol = IPPROTO_TCP;
	flow.source_port = ctx->remote_port;
	flow.destination_port = bpf_htons(ctx->local_port);
	reason = decide_inbound(pod, &flow);
	count(flow.netns, reason);
	if (reason != REASON_STEERED)
		return SK_PASS;

	key.netns = flow.netns;
	key.port = pod->inbound_port;
	/* An IPv6 socket may serve IPv4 too. */
	step = ctx->family == AF_INET ? 1 : 2;
	for (int slot = step - 1; slot < LISTENER_SLOTS; slot += step) {
		struct bpf_sock *listener;
		long error;

		key.slot = slot;
		listener = bpf_map_lookup_elem(&listeners, &key);
		if (!listener)
			continue;
		/* Refuses a listener of the other family. Of several with SO_REUSEPORT the kernel then chooses one, as without us. */
		error = bpf_sk_assign(ctx, listener, 0);
		bpf_sk_release(listener);
		if (!error)
			return SK_PASS;
	}
	count(flow.netns, REASON_INBOUND_REFUSED);
	return SK_DROP;
}

/* In listener_slots: the kernel does not take this socket into a sockhash (MPTCP), and will not the next time. */
enum { UNSTEERABLE = 0xffff };

/* Reached over lo only: nothing from outside is for it, with iptables neither. */
static __always_inline bool is_loopback_listener(__u32 family, __be32 ip4, const struct address *ip6)
{
	struct address address = family == AF_INET ? address_of_ipv4(ip4) : *ip6;

	return is_loopback(&address);
}

/* sockops TCP_LISTEN_CB. */
static __always_inline void on_listen(struct bpf_sock_ops *ctx)
{
	struct listener_key key = {.netns = bpf_get_netns_cookie(ctx)};
	struct pod *pod = bpf_map_lookup_elem(&pods, &key.netns);
	struct address ip6 = {};
	__u32 *slot_of_listener;
	int error;

	if (!pod)
		return;
	if (pod->flags & POD_KEEP_SOURCE)
		hold_listener_port(key.netns, ctx->local_port);
	if (!(pod->flags & POD_INBOUND) || bpf_htons(ctx->local_port) != pod->inbound_port)
		return;
	if (ctx->family == AF_INET6)
		ip6 = address_of_words(ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3]);
	if (is_loopback_listener(ctx->family, ctx->local_ip4, &ip6))
		return;

	slot_of_listener = ctx->sk ? bpf_sk_storage_get(&listener_slots, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE) : NULL;
	if (!slot_of_listener || *slot_of_listener)
		return;
	key.port = pod->inbound_port;
	for (int slot = ctx->family == AF_INET6; slot < LISTENER_SLOTS; slot += 2) {
		key.slot = slot;
		error = bpf_sock_hash_update(ctx, &listeners, &key, BPF_NOEXIST);
		if (error == -EEXIST)
			continue;
		*slot_of_listener = error ? UNSTEERABLE : 1 + slot;
		if (error)
			count(key.netns, REASON_LISTENER_UNSTEERABLE);
		return;
	}
	count(key.netns, REASON_LISTENER_LOST);
}

/*
 * Whether the iterator holds the socket in a way in which a sockhash can take it. Before 6.5 (6.1.42, 6.4.7) it held the very spin lock that the
 * update waits for, unless somebody else was in the way: a CPU of the node would hang for ever.
 */
static __always_inline bool can_be_taken(struct sock_common *sk)
{
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(sk);

	return tcp && ((struct sock *)tcp)->sk_lock.owned;
}

/* Run by the agent inside a pod's namespace: finds the listeners that were there first, and those whose slot another's death left behind. */
SEC("iter/tcp")
int find_listeners(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct listener_key key = {};
	struct address ip6 = {};
	__u32 *slot_of_listener;
	struct pod *pod;
	/* Not long: before 6.4 map operations set the lower half of it only. */
	int error;

	if (!sk || sk->skc_state != TCP_LISTEN)
		return 0;
	key.netns = sk->skc_net.net->net_cookie;
	pod = bpf_map_lookup_elem(&pods, &key.netns);
	if (!pod)
		return 0;
	if (pod->flags & POD_KEEP_SOURCE)
		hold_listener_port(key.netns, sk->skc_num);
	if (!(pod->flags & POD_INBOUND) || bpf_htons(sk->skc_num) != pod->inbound_port)
		return 0;
	if (sk->skc_family == AF_INET6)
		ip6 = address_of_words(sk->skc_v6_rcv_saddr.in6_u.u6_addr32[0], sk->skc_v6_rcv_saddr.in6_u.u6_addr32[1],
				       sk->skc_v6_rcv_saddr.in6_u.u6_addr32[2], sk->skc_v6_rcv_saddr.in6_u.u6_addr32[3]);
	if (is_loopback_listener(sk->skc_family, sk->skc_rcv_saddr, &ip6))
		return 0;

	slot_of_listener = bpf_sk_storage_get(&listener_slots, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!slot_of_listener || *slot_of_listener)
		return 0;
	key.port = pod->inbound_port;
	for (int slot = sk->skc_family == AF_INET6; slot < LISTENER_SLOTS; slot += 2) {
		key.slot = slot;
		error = can_be_taken(sk) ? bpf_map_update_elem(&listeners, &key, sk, BPF_NOEXIST) : -EBUSY;
		if (error == -EEXIST)
			continue;
		*slot_of_listener = error ? UNSTEERABLE : 1 + slot;
		if (error)
			count(key.netns, REASON_LISTENER_UNSTEERABLE);
		return 0;
	}
	count(key.netns, REASON_LISTENER_LOST);
	return 0;
}
