/* SPDX-License-Identifier: Dual MIT/GPL */
/* Questions that people ask; no packet ever meets these programs. */
#include "maps.h"
#include "lib/address.h"
#include "lib/decide.h"

/* `sidestep explain`: BPF_PROG_TEST_RUN on a struct question. What would become of this flow? */
SEC("tc")
int explain(struct __sk_buff *ctx)
{
	struct question question;
	struct pod *pod;

	if (bpf_skb_load_bytes(ctx, 0, &question, sizeof(question)))
		return -EINVAL;
	pod = bpf_map_lookup_elem(&pods, &question.flow.netns);
	if (!pod)
		return -ENOENT;
	question.inbound = pod->flags & POD_INBOUND ? decide_inbound(pod, &question.flow) : REASONS;
	resolve_unspecified(&question.flow);
	question.outbound = decide_outbound(pod, &question.flow).reason;
	return bpf_skb_store_bytes(ctx, 0, &question, sizeof(question), 0);
}

/* `sidestep sockets`: run inside a pod's namespace; writes a struct socket_record for each TCP socket that has a connection or listens. */
SEC("iter/tcp")
int sockets(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct socket_record record = {};
	struct acceleration_of *accelerated_socket;
	struct original_dst *original;
	struct owner owner = {.uid = ctx->uid};
	struct tcp_sock *tcp;
	struct flow flow = {};
	struct pod *pod;

	if (!common)
		return 0;
	/* Not for one in TIME_WAIT, nor for a request. */
	tcp = bpf_skc_to_tcp_sock(common);
	if (!tcp)
		return 0;

	record.state = common->skc_state;
	record.ipv6_socket = common->skc_family == AF_INET6;
	if (record.ipv6_socket) {
		record.local = address_of_words(common->skc_v6_rcv_saddr.in6_u.u6_addr32[0], common->skc_v6_rcv_saddr.in6_u.u6_addr32[1],
						common->skc_v6_rcv_saddr.in6_u.u6_addr32[2], common->skc_v6_rcv_saddr.in6_u.u6_addr32[3]);
		record.remote = address_of_words(common->skc_v6_daddr.in6_u.u6_addr32[0], common->skc_v6_daddr.in6_u.u6_addr32[1],
						 common->skc_v6_daddr.in6_u.u6_addr32[2], common->skc_v6_daddr.in6_u.u6_addr32[3]);
	} else {
		record.local = address_of_ipv4(common->skc_rcv_saddr);
		record.remote = address_of_ipv4(common->skc_daddr);
	}
	record.local_port = common->skc_num;
	record.remote_port = bpf_ntohs(common->skc_dport);
	/* Of a socket without a file, which nobody has any more, the uid at least is known. */
	read_owner((struct sock *)tcp, &owner);
	record.uid = owner.uid;
	record.mark = ((struct sock *)tcp)->sk_mark;

	original = bpf_sk_storage_get(&original_dsts, (struct sock *)tcp, NULL, 0);
	if (original) {
		record.role = original->role;
		record.original = original->address;
		record.original_port = original->port;
	}

	accelerated_socket = bpf_sk_storage_get(&acceleration_of, (struct sock *)tcp, NULL, 0);
	if (accelerated_socket) {
		record.accelerated = 1;
		record.on_tcp = accelerated_socket->on_tcp;
		record.redirected_bytes = accelerated_socket->redirected_bytes;
		record.passed_bytes = accelerated_socket->passed_bytes;
		record.fallbacks = accelerated_socket->fallbacks;
	}

	flow.netns = common->skc_net.net->net_cookie;
	pod = bpf_map_lookup_elem(&pods, &flow.netns);
	record.outbound = REASONS;
	record.inbound = REASONS;
	if (pod && record.state != TCP_LISTEN) {
		flow.protocol = IPPROTO_TCP;
		flow.mark = record.mark;
		flow.uid = owner.uid;
		flow.gid = owner.gid;
		/* The cgroup of a socket cannot be asked for here: rather take it for exempt than for one that was missed. */
		flow.in_exempt_cgroup = pod->exempt_cgroup_levels != 0;
		flow.source = record.local;
		flow.source_port = bpf_htons(record.local_port);
		flow.destination = record.remote;
		flow.destination_port = common->skc_dport;
		record.outbound = decide_outbound(pod, &flow).reason;

		flow.source = record.remote;
		flow.source_port = common->skc_dport;
		flow.destination = record.local;
		flow.destination_port = bpf_htons(record.local_port);
		if (pod->flags & POD_INBOUND)
			record.inbound = decide_inbound(pod, &flow);
	}
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}
