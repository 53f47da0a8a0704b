/* SPDX-License-Identifier: Dual MIT/GPL */
/* What only programs can do when newer ones take the place of older ones (src/loader/upgrade.ts). */
#include "maps.h"

enum { CARRIED_COUNTERS = offsetof(struct carried, counters), CARRIED_TRAFFIC = offsetof(struct carried, traffic) };

/*
 * BPF_PROG_TEST_RUN on a struct carried: what the older layout's programs counted comes to what this one's count meanwhile. From user space it would be
 * a read and a write, with counts between them. On this CPU's value, as only the sum over all is ever shown.
 */
SEC("tc")
int add_counts(struct __sk_buff *ctx)
{
	struct counters *counters_of_pod;
	struct traffic *traffic_of_pod;
	__u64 netns, amount;

	if (bpf_skb_load_bytes(ctx, offsetof(struct carried, netns), &netns, sizeof(netns)))
		return -EINVAL;
	counters_of_pod = bpf_map_lookup_elem(&counters, &netns);
	traffic_of_pod = bpf_map_lookup_elem(&traffic, &netns);
	if (!counters_of_pod || !traffic_of_pod)
		return -ENOENT;
	for (__u32 i = 0; i < sizeof(struct counters) / sizeof(amount); i++) {
		if (bpf_skb_load_bytes(ctx, CARRIED_COUNTERS + i * sizeof(amount), &amount, sizeof(amount)))
			return -EINVAL;
		__sync_fetch_and_add((__u64 *)counters_of_pod + i, amount);
	}
	for (__u32 i = 0; i < sizeof(struct traffic) / sizeof(amount); i++) {
		if (bpf_skb_load_bytes(ctx, CARRIED_TRAFFIC + i * sizeof(amount), &amount, sizeof(amount)))
			return -EINVAL;
		__sync_fetch_and_add((__u64 *)traffic_of_pod + i, amount);
	}
	return 0;
}

/*
 * Attached to `accelerated` in place of move_bytes itself: a socket keeps for life the program that it was joined under (sock_map_link), which would go on reading an
 * older layout's maps. This one never changes, and finds the newest in the slot; nothing there: by TCP.
 */
SEC("sk_msg")
int message(struct sk_msg_md *msg)
{
	bpf_tail_call(msg, &msg_programs, 0);
	return SK_PASS;
}
