/* SPDX-License-Identifier: Dual MIT/GPL */
#ifndef SIDESTEP_MAPS_H
#define SIDESTEP_MAPS_H

#include "layout.h"
#include "lib/context.h"

/*
 * BPF_F_NO_PREALLOC where only the agent adds entries: memory follows the number of pods. What connections write (handshakes, passes,
 * client_ports) is allocated up front: a connection never waits for, or fails for want of, an allocation.
 */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct pod);
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct pod_info);
} pod_info SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct counters);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct prefix_key);
	__type(value, struct prefix);
} prefixes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct exemption_key);
	__type(value, struct exemption);
} exemptions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct port_key);
	__type(value, struct port);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct address_key);
	__type(value, __u64);
} addresses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, struct pass_key);
	__type(value, struct pass);
} passes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

/* A listener's slot in `listeners`, plus one: what is found again by walking the sockets is already there. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} listener_slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct client_port_key);
	__type(value, struct client_port);
} client_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct node);
} node SEC(".maps");

/* cookie → socket, of accelerated pairs: what the programs move_bytes and one_queue are attached to. An entry goes with its socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 131072);
	__type(key, __u64);
	__type(value, __u64);
} accelerated SEC(".maps");

/* 0 → move_bytes of the build that runs. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} msg_programs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct acceleration_of);
} acceleration_of SEC(".maps");

/* Its cookie, of a socket that `pair` was content with, until `join` has put it into `accelerated`. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
} joining SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct traffic);
} traffic SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 262144);
} requests SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, struct handshake_key);
	__type(value, struct original_dst);
} handshakes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct original_dst);
} original_dsts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct build);
} build SEC(".maps");

/* Puts the enums that no map's type mentions into BTF. */
const enum layout anchor_layout __attribute__((used)) = LAYOUT_VERSION;
const enum reason anchor_reason __attribute__((used)) = REASON_REDIRECTED;
const enum pod_flags anchor_pod_flags __attribute__((used)) = POD_SIDECAR;
const enum prefix_flags anchor_prefix_flags __attribute__((used)) = PREFIX_LOCAL;
const enum port_flags anchor_port_flags __attribute__((used)) = PORT_OUTBOUND_EXCLUDED;
const enum namespace_change anchor_namespace_change __attribute__((used)) = NAMESPACE_RULE4;
const enum role anchor_role __attribute__((used)) = ROLE_CLIENT;
const struct question anchor_question __attribute__((used)) = {};
const struct request anchor_request __attribute__((used)) = {};
const struct pairing anchor_pairing __attribute__((used)) = {};
const struct joined anchor_joined __attribute__((used)) = {};
const enum tcp_reason anchor_tcp_reason __attribute__((used)) = TCP_OFF;
const struct carried anchor_carried __attribute__((used)) = {};
const struct socket_record anchor_socket_record __attribute__((used)) = {};

static __always_inline void count(__u64 netns, enum reason reason)
{
	struct counters *counters_of_pod = bpf_map_lookup_elem(&counters, &netns);

	/*
	 * Absent when the pod was removed while this connection was on its way. Atomic although per CPU: cgroup programs run preemptible
	 * (migration is off, preemption is not), and softirqs come in between.
	 */
	if (counters_of_pod)
		__sync_fetch_and_add(&counters_of_pod->count[reason], 1);
}

#endif
