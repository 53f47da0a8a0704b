/* SPDX-License-Identifier: Dual MIT/GPL */
#ifndef SIDESTEP_ADDRESS_H
#define SIDESTEP_ADDRESS_H

#include "../layout.h"
#include "context.h"

static __always_inline struct address address_of_ipv4(__be32 ipv4)
{
	struct address address = {.word = {0, 0, bpf_htonl(0xffff), ipv4}};

	return address;
}

static __always_inline bool is_ipv4(const struct address *address)
{
	return !address->word[0] && !address->word[1] && address->word[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_none(const struct address *address)
{
	return !(address->word[0] | address->word[1] | address->word[2] | address->word[3]);
}

static __always_inline struct address address_of_words(__be32 a, __be32 b, __be32 c, __be32 d)
{
	struct address address = {.word = {a, b, c, d}};

	return address;
}

static __always_inline struct address localhost(bool ipv4)
{
	return ipv4 ? address_of_ipv4(bpf_htonl(0x7f000001)) : address_of_words(0, 0, 0, bpf_htonl(1));
}

/* 0.0.0.0 or :: */
static __always_inline bool is_unspecified(const struct address *address)
{
	return is_none(address) || (is_ipv4(address) && !address->word[3]);
}

static __always_inline bool is_ipv4_loopback(const struct address *address)
{
	return is_ipv4(address) && (address->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

/* ::6, which a sidecar's proxy binds towards the application, and 127.0.0.6 for IPv4. */
static __always_inline bool is_passthrough_source(const struct address *address)
{
	if (is_ipv4(address))
		return address->word[3] == bpf_htonl(0x7f000006);
	return !(address->word[0] | address->word[1] | address->word[2]) && address->word[3] == bpf_htonl(6);
}

/* 127/8, ::1, and ::6, which the agent puts on lo for sidecars. */
static __always_inline bool is_loopback(const struct address *address)
{
	if (is_ipv4(address))
		return is_ipv4_loopback(address);
	return !(address->word[0] | address->word[1] | address->word[2]) &&
	       (address->word[3] == bpf_htonl(1) || address->word[3] == bpf_htonl(6));
}

#endif
