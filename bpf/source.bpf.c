/* SPDX-License-Identifier: Dual MIT/GPL */
/*
 * Ports for sockets with which the proxy keeps a client's address towards the application. The kernel would choose any port that is free on
 * this host, and the client may be using the same one for a live connection to the same address and port of this pod: then one of the two
 * breaks. So the port is chosen here, from where clients seldom are, and never one that is known to be in use.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/client_ports.h"
#include "lib/decide.h"

/* How long a port is kept for a socket that was bound and may never connect. */
#define BOUND_HOLD_NS (60 * 1000000000ULL)

/* Each of these finds a free one with the probability that ports of the range are free: 16 in a range two thirds full fail once in 650 times. */
enum { PROBES = 16 };

static __always_inline bool take_port(__u64 netns, const struct address *client, __u16 port, __u64 now)
{
	struct client_port_key key = {.netns = netns, .client = *client, .port = port};
	struct client_port taken = {.busy_until_ns = now + BOUND_HOLD_NS};
	struct client_port_key listener = {.netns = netns, .port = port};
	struct client_port *there;

	there = bpf_map_lookup_elem(&client_ports, &listener);
	if (there && there->busy_until_ns > now)
		return false;
	there = bpf_map_lookup_elem(&client_ports, &key);
	if (there && there->busy_until_ns > now)
		return false;
	if (!there)
		return !bpf_map_update_elem(&client_ports, &key, &taken, BPF_NOEXIST);
	/* Of two CPUs that find the same entry free, one gets it. */
	now = there->busy_until_ns;
	return __sync_val_compare_and_swap(&there->busy_until_ns, now, taken.busy_until_ns) == now;
}

/* @return a port in host order; 0: leave it to the kernel */
static __always_inline __u16 choose_port(struct bpf_sock_addr *ctx, const struct address *address)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	int on = 1;
	__u64 now;

	if (!pod || !(pod->flags & POD_KEEP_SOURCE) || !has_exempt_mark(pod, ctx->sk->mark))
		return 0;
	if (is_unspecified(address) || prefix_flags_of(pod->policy, address) & (PREFIX_LOCAL | PREFIX_NOT_UNICAST))
		return 0;

	/*
	 * A proxy whose bind fails goes on without the source. client_ports forgets the oldest when it is full; a port that is in use after all can
	 * then be bound once more, and only a second connection to the same port of the pod is refused.
	 */
	bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	now = bpf_ktime_get_boot_ns();
	for (int i = 0; i < PROBES; i++) {
		__u16 port = FIRST_RANGE_START + bpf_get_prandom_u32() % FIRST_RANGE_SIZE;

		if (take_port(netns, address, port, now))
			return port;
	}
	for (int i = 0; i < PROBES; i++) {
		__u16 port = SECOND_RANGE_START + bpf_get_prandom_u32() % SECOND_RANGE_SIZE;

		if (take_port(netns, address, port, now))
			return port;
	}
	count(netns, REASON_SOURCE_PORT_LEFT);
	return 0;
}

/* What a cgroup/bind program returns. */
enum { BIND_ALLOW = 1 };

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	struct address address;
	__u16 port;

	if (ctx->protocol != IPPROTO_TCP || ctx->user_port)
		return BIND_ALLOW;
	address = address_of_ipv4(ctx->user_ip4);
	port = choose_port(ctx, &address);
	if (port)
		ctx->user_port = bpf_htons(port);
	return BIND_ALLOW;
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	struct address address;
	__u16 port;

	if (ctx->protocol != IPPROTO_TCP || ctx->user_port)
		return BIND_ALLOW;
	address = address_of_words(ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	port = choose_port(ctx, &address);
	if (port)
		ctx->user_port = bpf_htons(port);
	return BIND_ALLOW;
}
