/* SPDX-License-Identifier: Dual MIT/GPL */
/* Which ports are given to sockets that keep a client's address, and which of them are in use. */
#ifndef SIDESTEP_CLIENT_PORTS_H
#define SIDESTEP_CLIENT_PORTS_H

#include "../maps.h"

/* Above the usual ephemeral range (32768 to 60999) and below it, but for what services listen on (below 16384). */
enum {
	FIRST_RANGE_START = 61000,
	FIRST_RANGE_SIZE = 65536 - 61000,
	SECOND_RANGE_START = 16384,
	SECOND_RANGE_SIZE = 16384,
};

#define FOREVER_NS (~0ULL)
/* TCP_TIMEWAIT_LEN */
#define TIME_WAIT_NS (60 * 1000000000ULL)
/* The agent renews them at each resync (an hour at most), and somebody may have stopped it. */
#define LISTENER_PORT_HOLD_NS (24 * 3600 * 1000000000ULL)

static __always_inline bool is_given_out(__u16 port)
{
	return port >= FIRST_RANGE_START || (port >= SECOND_RANGE_START && port < SECOND_RANGE_START + SECOND_RANGE_SIZE);
}

/* A wildcard listener has its port on every client's address too: as the client "none". */
static __always_inline void hold_listener_port(__u64 netns, __u16 port)
{
	struct client_port_key key = {.netns = netns, .port = port};
	struct client_port held = {.busy_until_ns = bpf_ktime_get_boot_ns() + LISTENER_PORT_HOLD_NS};

	if (is_given_out(port))
		bpf_map_update_elem(&client_ports, &key, &held, BPF_ANY);
}

static __always_inline void hold_client_port(__u64 netns, const struct address *client, __u16 port, __u64 until_ns)
{
	struct client_port_key key = {.netns = netns, .client = *client, .port = port};
	struct client_port held = {.busy_until_ns = until_ns};

	if (is_given_out(port))
		bpf_map_update_elem(&client_ports, &key, &held, BPF_ANY);
}

#endif
