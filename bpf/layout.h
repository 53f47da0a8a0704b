/* SPDX-License-Identifier: Dual MIT/GPL */
/*
 * Everything that user space and the programs share, once. TypeScript derives its codecs from the BTF of the compiled object, so
 * nothing here is written down a second time. What the codec reads out of a declaration:
 *
 *   __be16, __be32     big-endian by their typedef name
 *   struct address     shown as text: 10.0.0.1, fd00::1
 *   char name[N]       text that ends at the first NUL
 *   enum               the enumerator's name
 *   pad…               zero; every hole has to be named like this, keys are hashed as bytes
 */
#ifndef SIDESTEP_LAYOUT_H
#define SIDESTEP_LAYOUT_H

#include <linux/types.h>

/* Bump on ANY change below: it is part of the pin path, <bpffs>/sidestep/v<LAYOUT_VERSION>/. */
enum layout { LAYOUT_VERSION = 1 };

/* IPv6 in network order; IPv4 is ::ffff:a.b.c.d, so that one form serves every kind of socket. All zero: none. */
struct address {
	__be32 word[4];
};

/* What became of a connection of an enrolled pod. The order is the ABI of struct counters. */
enum reason {
	/* Sent to the proxy. */
	REASON_REDIRECTED,

	/* Left alone, in the order of the questions: the first yes decides. */
	REASON_BYPASS_MARK,
	REASON_BYPASS_UID,
	REASON_BYPASS_GID,
	REASON_BYPASS_CGROUP,
	REASON_BYPASS_LOCAL,           /* loopback, or an address of the pod: routed over lo */
	REASON_BYPASS_NOT_UNICAST,     /* broadcast and multicast: the stack refuses TCP to them */

	/* Refused here, because it was to be captured and could not be. */
	REASON_REFUSED_NO_PROXY,       /* no proxy address in the destination's family */
	REASON_REFUSED_NO_MEMORY,      /* the original destination could not be kept with the socket */
	REASON_REFUSED_SOURCE,         /* bound to 127/8, from where nothing leaves the pod; or the pod's address could not be bound */

	/* Of those redirected: what happened next. */
	REASON_ACCEPTED,               /* reached the proxy's socket together with its original destination */
	REASON_CONNECT_FAILED,         /* the proxy did not answer, refused, or the application gave up first */
	REASON_ORIGINAL_DST_LOST,      /* no room to carry the original destination: the proxy cannot learn it */

	REASONS,
};

/* counters: netns cookie → one of these per CPU. Made by the agent when it enrols the pod. */
struct counters {
	__u64 count[REASONS];
};

struct mark {
	__u32 value;
	__u32 mask;
};

/* Where one family's captured connections go. */
struct target {
	struct address address;        /* none: captured connections of this family are refused */
	struct address source;         /* bound when the application bound none; only for a loopback address, which would show as peer */
	__be16 port;
	__u16 in_pod;                  /* 1: address is inside the pod's own namespace */
	__u32 pad;
};

enum { MARKS_MAX = 4 };

enum pod_flags {
	POD_EXEMPT_UIDS = 1,           /* exemptions holds uids of this policy */
	POD_EXEMPT_GIDS = 2,
};

/*
 * pods: netns cookie → what to do with its connections. An entry is the whole enrolment: present, the pod is captured; absent, no
 * program changes anything. It is replaced as one value; lists hang on `policy`, so that a new policy is written beside the old one
 * and becomes visible, whole, by this one write.
 */
struct pod {
	__u32 policy;                  /* first part of the keys in prefixes and exemptions */
	__u32 flags;                   /* enum pod_flags */
	__u32 exempt_cgroup_levels;    /* bit N: exemptions holds a cgroup at depth N below the root */
	__u32 mark_count;
	struct mark marks[MARKS_MAX];
	struct target target4;
	struct target target6;
};

/* pod_info: netns cookie → what people call it. No program reads it. */
struct pod_info {
	char name[320];                /* namespace/name: 63 + 1 + 253 characters at most */
	char mode[16];
	struct address address4;
	struct address address6;
	__u64 netns_device;            /* with netns_inode: the namespace file's identity when it was enrolled */
	__u64 netns_inode;
	__u64 enrolled_at_ms;          /* Unix time */
};

/*
 * prefixes: longest prefix match.   {policy 3, 10.0.0.2/32}  → local
 *                                   {policy 3, 127.0.0.0/8}  → local
 *                                   {policy 3, 224.0.0.0/4}  → not unicast
 */
struct prefix_key {
	__u32 bits;                    /* that count in what follows: 32 for policy and 0 to 128 of the address */
	__be32 policy;
	struct address address;
};

enum prefix_kind {
	PREFIX_LOCAL = 1,
	PREFIX_NOT_UNICAST = 2,
};

struct prefix {
	enum prefix_kind kind;
};

enum exemption_kind {
	EXEMPT_UID = 1,
	EXEMPT_GID = 2,
	EXEMPT_CGROUP = 3,
};

/* exemptions: a set. Ids as the initial user namespace counts them; a cgroup stands for everything below it. */
struct exemption_key {
	__u32 policy;
	enum exemption_kind kind;
	__u64 id;
};

struct exemption {
	__u32 present;                 /* 1 */
};

enum role {
	ROLE_CLIENT = 1,               /* the application's socket */
	ROLE_PROXY = 2,                /* the socket that the proxy accepted */
};

/* original_dsts: socket storage; lives and dies with the socket, so nothing has to be cleaned up and nothing can be evicted. */
struct original_dst {
	struct address address;
	__be16 port;
	__u16 in_pod;                  /* of the target it was sent to */
	enum role role;
	__u64 netns;                   /* of the pod */
};

/*
 * handshakes: from the application's SYN to the proxy's established socket.
 *
 *   {netns 4711, client 10.0.0.2:40000, proxy 10.0.0.2:15001} → original destination 10.0.9.9:80
 *
 * netns is the pod's cookie where the proxy is inside the pod, because two pods may have the same addresses (127.0.0.1 at least);
 * 0 where it is outside, because the two ends then see different cookies.
 */
struct handshake_key {
	__u64 netns;
	struct address client;
	struct address proxy;
	__u16 client_port;             /* host order, as bpf_sock_ops has them */
	__u16 proxy_port;
	__u32 pad;
};

/* build: which object runs. */
struct build {
	__u32 layout;
	char version[28];
	char object_sha256[68];
};

#endif
