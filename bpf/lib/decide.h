/* SPDX-License-Identifier: Dual MIT/GPL */
/*
 * The contract: what is to become of a flow. Nothing here looks at a context or a socket, so that the answer to `explain` is the answer
 * that a connection gets.
 */
#ifndef SIDESTEP_DECIDE_H
#define SIDESTEP_DECIDE_H

#include "address.h"
#include "exempt.h"

struct decision {
	enum reason reason;
	bool local;                    /* the destination is routed over lo */
};

static __always_inline bool is_captured(enum reason reason)
{
	return reason <= REASON_REDIRECTED_DNS;
}

static __always_inline __u32 prefix_flags_of(__u32 policy, const struct address *address)
{
	struct prefix_key key = {.bits = 32 + 128, .policy = bpf_htonl(policy), .address = *address};
	struct prefix *prefix = bpf_map_lookup_elem(&prefixes, &key);

	return prefix ? prefix->flags : 0;
}

static __always_inline __u32 port_flags_of(const struct pod *pod, __be16 port)
{
	struct port_key key = {.policy = pod->policy, .port = port};
	struct port *found;

	if (!(pod->flags & POD_PORTS))
		return 0;
	found = bpf_map_lookup_elem(&ports, &key);
	return found ? found->flags : 0;
}

static __always_inline bool is_excluded_interface(const struct pod *pod, __u32 interface)
{
	return pod->flags & POD_EXEMPT_INTERFACES && interface && is_exempt(pod->policy, EXEMPT_INTERFACE, interface);
}

/* Whose address this is; 0 is nobody's. */
static __always_inline __u64 pod_at(const struct address *address)
{
	struct address_key key = {.bits = 128, .address = *address};
	__u64 *netns = bpf_map_lookup_elem(&addresses, &key);

	return netns ? *netns : 0;
}

static __always_inline bool is_dns(const struct pod *pod, const struct flow *flow)
{
	return pod->dns_port && flow->destination_port == bpf_htons(53);
}

/* CAPTURE.md 1, and 3, which is the same without DNS and the way in. */
static __always_inline enum reason decide_by_exemption(const struct pod *pod, const struct flow *flow, __u32 flags)
{
	bool tcp = flow->protocol == IPPROTO_TCP;

	if (has_exempt_mark(pod, flow->mark))
		return REASON_BYPASS_MARK;
	if (pod->flags & POD_EXEMPT_UIDS && is_exempt(pod->policy, EXEMPT_UID, flow->uid))
		return REASON_BYPASS_UID;
	if (pod->flags & POD_EXEMPT_GIDS && is_exempt(pod->policy, EXEMPT_GID, flow->gid))
		return REASON_BYPASS_GID;
	if (flow->in_exempt_cgroup)
		return REASON_BYPASS_CGROUP;
	if (tcp && flags & PREFIX_NOT_UNICAST)
		return REASON_BYPASS_NOT_UNICAST;
	if (tcp && is_dns(pod, flow) && !(flags & PREFIX_LOCALHOST))
		return REASON_REDIRECTED_DNS; /* O3 */
	if (flags & PREFIX_LOCAL)
		return REASON_BYPASS_LOCAL; /* O5 */
	return tcp ? REASON_REDIRECTED : REASON_REDIRECTED_DNS; /* O6, O2 */
}

/* As the kernel does before it looks for a route: to the address that the socket is bound to, or to localhost. */
static __always_inline void resolve_unspecified(struct flow *flow)
{
	bool ipv4 = is_ipv4(&flow->destination);

	if (is_unspecified(&flow->destination))
		flow->destination = ipv4 && !is_none(&flow->source) ? flow->source : localhost(ipv4);
}

/* An unbound IPv6 socket takes a local destination as its source; an unbound IPv4 one takes 127.0.0.1 for all of 127/8. */
static __always_inline bool is_passthrough(const struct flow *flow)
{
	bool takes_destination = is_none(&flow->source) && !is_ipv4(&flow->destination);

	return is_passthrough_source(takes_destination ? &flow->destination : &flow->source);
}

/* CAPTURE.md 2. Called for TCP, and for UDP to port 53 with DNS capture. */
static __always_inline enum reason decide_sidecar(const struct pod *pod, const struct flow *flow, __u32 flags)
{
	__u32 port = port_flags_of(pod, flow->destination_port);
	bool tcp = flow->protocol == IPPROTO_TCP;
	bool dns = is_dns(pod, flow);
	bool local = flags & PREFIX_LOCAL;
	bool to_itself = local && !(flags & PREFIX_LOCALHOST) && tcp && flow->destination_port != bpf_htons(15008);
	bool local_passes = local && !dns && (tcp || !pod->dns_port) && !(pod->flags & POD_INCLUDE_LOOPBACK);
	bool is_uid = flow->uid == pod->proxy_uid;
	bool is_gid = flow->gid == pod->proxy_gid;

	if (tcp && flags & PREFIX_NOT_UNICAST)
		return REASON_BYPASS_NOT_UNICAST;
	if (flags & PREFIX_INTERFACE || is_excluded_interface(pod, flow->interface))
		return REASON_BYPASS_INTERFACE; /* A0 */
	if (port & PORT_OUTBOUND_EXCLUDED)
		return REASON_BYPASS_PORT; /* A1 */
	if (local && is_passthrough(flow))
		return REASON_BYPASS_SOURCE; /* A2 */
	if (is_uid)
		return to_itself && !dns ? REASON_REDIRECTED_INBOUND : REASON_BYPASS_UID; /* A3, A5 */
	if (local_passes)
		return REASON_BYPASS_LOCAL; /* A4, and A7, which differs in the gid and so is never reached */
	if (is_gid)
		return to_itself ? REASON_REDIRECTED_INBOUND : REASON_BYPASS_GID; /* A6, A8 */
	if (dns)
		return REASON_REDIRECTED_DNS; /* A10 */
	if (flags & PREFIX_LOCALHOST)
		return REASON_BYPASS_LOCAL; /* A11 */
	if (flags & PREFIX_EXCLUDED)
		return REASON_BYPASS_RANGE; /* A12 */
	if (port & PORT_OUTBOUND_INCLUDED || pod->flags & POD_INCLUDE_ALL || flags & PREFIX_INCLUDED)
		return REASON_REDIRECTED; /* A13, A14 */
	return REASON_BYPASS_NOT_INCLUDED; /* A15 */
}

enum { DECIDED_LOCAL = 256 };

/*
 * Global, so that the verifier looks at it once and not along every path that leads to it: loading takes a third of the time.
 *
 * @return enum reason, with DECIDED_LOCAL where the destination is routed over lo
 */
__noinline int outbound_reason(const struct pod *pod, const struct flow *flow)
{
	enum reason reason;
	__u32 flags;

	if (!pod || !flow)
		return REASON_REDIRECTED;
	flags = prefix_flags_of(pod->policy, &flow->destination);
	reason = pod->flags & POD_SIDECAR ? decide_sidecar(pod, flow, flags) : decide_by_exemption(pod, flow, flags);
	return reason | (flags & PREFIX_LOCAL ? DECIDED_LOCAL : 0);
}

static __always_inline struct decision decide_outbound(const struct pod *pod, const struct flow *flow)
{
	__u32 decided = outbound_reason(pod, flow);
	struct decision decision = {.reason = decided & (DECIDED_LOCAL - 1), .local = decided & DECIDED_LOCAL};

	/* Never so; the verifier does not know. */
	if (decision.reason >= REASONS)
		decision.reason = REASON_REDIRECTED;
	return decision;
}

static __always_inline struct pass *pass_with(const struct flow *flow)
{
	struct pass_key key = {
		.client = flow->source,
		.server = flow->destination,
		.client_port = flow->source_port,
		.server_port = flow->destination_port,
	};

	return bpf_map_lookup_elem(&passes, &key);
}

/*
 * Where only the pod itself can connect from. Others may send packets with ::6 or 127/8 as their source (the kernel drops ::1 only), but where these are
 * addresses of lo, the answer does not get back to them.
 */
static __always_inline bool is_own_source(const struct pod *pod, __u64 netns, const struct address *source)
{
	if (is_loopback(source))
		return pod->flags & POD_SIDECAR || is_ipv4(source) || !is_passthrough_source(source);
	return pod_at(source) == netns;
}

/* TCP that comes from outside, as an sk_lookup program sees it: a SYN without an established socket. */
static __always_inline enum reason decide_inbound(const struct pod *pod, const struct flow *flow)
{
	struct pass *pass;
	__u32 port;

	/*
	 * The proxy under a client's address comes over lo (keep_source). What a pod sends under its own arrives from eth0 in this hook's eyes;
	 * steering it would loop the proxy onto itself.
	 */
	if (flow->interface == LOOPBACK_IFINDEX || is_own_source(pod, flow->netns, &flow->source))
		return REASON_INBOUND_BYPASS_OWN;
	pass = pass_with(flow);
	if (pass && pass->reason == REASON_INBOUND_BYPASS_NODE)
		return REASON_INBOUND_BYPASS_NODE;
	/* Before 5.17 the interface is not known. Where it is, this is not the proxy but the client itself, from the port that the proxy was given. */
	if (pass && !flow->interface)
		return REASON_INBOUND_BYPASS_OWN;
	if (is_excluded_interface(pod, flow->interface))
		return REASON_INBOUND_BYPASS_INTERFACE;
	port = port_flags_of(pod, flow->destination_port);
	if (port & PORT_INBOUND_EXCLUDED)
		return REASON_INBOUND_BYPASS_PORT;
	if (!(pod->flags & POD_INBOUND_ALL) && !(port & PORT_INBOUND_INCLUDED))
		return REASON_INBOUND_BYPASS_NOT_INCLUDED;
	return REASON_STEERED;
}

#endif
