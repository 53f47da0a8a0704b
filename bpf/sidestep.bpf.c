/* SPDX-License-Identifier: Dual MIT/GPL */
/* The one object: each concern in its own file, compiled together. */
#include "outbound.bpf.c"
#include "inbound.bpf.c"
#include "source.bpf.c"
#include "accelerate.bpf.c"
#include "original_dst.bpf.c"
#include "ask.bpf.c"
#include "upgrade.bpf.c"

char LICENSE[] SEC("license") = "Dual MIT/GPL";
