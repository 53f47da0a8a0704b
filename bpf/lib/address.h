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

#endif
