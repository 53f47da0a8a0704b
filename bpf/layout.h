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
enum layout { LAYOUT_VERSION = 2 };

/* IPv6 in network order; IPv4 is ::ffff:a.b.c.d, so that one form serves every kind of socket. All zero: none. */
struct address {
	__be32 word[4];
};

/*
 * What became of a connection of an enrolled pod. The order is the ABI of struct counters.
 * CAPTURE.md's rows are named where a reason stands for one.
 */
enum reason {
	/* Captured on the way out. */
	REASON_REDIRECTED,             /* to the proxy's outbound port */
	REASON_REDIRECTED_INBOUND,     /* to its inbound port: the proxy called its own pod (A3, A6) */
	REASON_REDIRECTED_DNS,         /* to its DNS port: a connection, or, on a socket without a peer, a datagram */

	/* Left alone on the way out: the first yes decides. */
	REASON_BYPASS_MARK,
	REASON_BYPASS_UID,
	REASON_BYPASS_GID,
	REASON_BYPASS_CGROUP,
	REASON_BYPASS_LOCAL,           /* loopback, or an address of the pod: routed over lo */
	REASON_BYPASS_NOT_UNICAST,     /* broadcast and multicast: the stack refuses TCP to them */
	REASON_BYPASS_INTERFACE,       /* the socket's, or the route's, is excluded (A0) */
	REASON_BYPASS_PORT,            /* excluded (A1) */
	REASON_BYPASS_SOURCE,          /* 127.0.0.6 or ::6: the proxy calls the application (A2) */
	REASON_BYPASS_RANGE,           /* excluded (A12) */
	REASON_BYPASS_NOT_INCLUDED,    /* (A15) */

	/* Refused on the way out, because it was to be captured and could not be. */
	REASON_REFUSED_NO_PROXY,       /* no proxy address in the destination's family */
	REASON_REFUSED_NO_MEMORY,      /* the original destination could not be kept with the socket */
	REASON_REFUSED_SOURCE,         /* bound to 127/8, from where nothing leaves the pod; or the pod's address could not be bound */

	/* Of those redirected: what happened next. */
	REASON_ACCEPTED,               /* reached the proxy's socket together with its original destination */
	REASON_CONNECT_FAILED,         /* the proxy did not answer, refused, or the application gave up first */
	REASON_ORIGINAL_DST_LOST,      /* no room to carry the original destination: the proxy cannot learn it */

	/* On the way in: SYNs that found no established socket, so a retransmission counts again. */
	REASON_STEERED,                /* to the proxy's inbound listener */
	REASON_INBOUND_BYPASS_OWN,     /* from an address of the pod, or from a socket in the pod that keeps a client's address */
	REASON_INBOUND_BYPASS_NODE,    /* from the node's own namespace: probes (P1) */
	REASON_INBOUND_BYPASS_INTERFACE,
	REASON_INBOUND_BYPASS_PORT,    /* excluded, or 15008 */
	REASON_INBOUND_BYPASS_NOT_INCLUDED,
	REASON_INBOUND_REFUSED,        /* to be steered, and the proxy does not listen */

	/* Book-keeping that found no room. */
	REASON_PASS_LOST,              /* passes is full: this connection into the pod meets the proxy although it should not */
	REASON_LISTENER_LOST,          /* the slots of listeners are taken */
	REASON_LISTENER_UNSTEERABLE,   /* the proxy's listener is of a kind that connections cannot be given to (MPTCP) */

	/* The proxy kept a client's address towards the application. */
	REASON_SOURCE_KEPT,
	REASON_SOURCE_PORT_LEFT,       /* no port was free of the client's own: the kernel chose, and may meet a live one */

	/* Local pairs that showed themselves chatty: their bytes go past the TCP stack from now on, or do not, and why. */
	REASON_ACCELERATED,
	REASON_UNACCELERATED_GONE,     /* closed before the agent came to it, or its peer is not on this node */
	REASON_UNACCELERATED_STRANGER, /* what has the peer's addresses is not its peer: the sequence numbers do not fit */
	REASON_UNACCELERATED_BLOCKING, /* a socket without O_NONBLOCK would see EAGAIN */
	REASON_UNACCELERATED_ULP,      /* TLS in the kernel, or MPTCP */
	REASON_UNACCELERATED_BUSY,     /* another sockmap has the socket (EBUSY) */
	REASON_UNACCELERATED_NO_ROOM,
	REASON_UNACCELERATED_UNREAD,   /* bytes were unread each time that the agent looked */
	REASON_UNACCELERATED_RACED,    /* bytes were read in the very moment of joining: reset, as some might be read twice */
	REASON_UNACCELERATED_UNHEARD,  /* the agent is dead or behind: requests is full; asked again at the next exchange */

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
	struct address source;         /* the pod's own: bound when the application bound none and the connection goes to loopback */
	__be16 port;
	__u16 in_pod;                  /* 1: address is inside the pod's own namespace */
	__u32 spread;                  /* 1: the proxy is asked for at a loopback address of the destination's own where that is possible */
};

enum { MARKS_MAX = 4 };

enum pod_flags {
	POD_SIDECAR = 1,               /* rows A0 to A15 decide; else the order of O2 to O6 */
	POD_EXEMPT_UIDS = 2,           /* exemptions holds uids of this policy */
	POD_EXEMPT_GIDS = 4,
	POD_EXEMPT_INTERFACES = 8,
	POD_PORTS = 16,                /* ports holds entries of this policy */
	POD_INCLUDE_ALL = 32,          /* includeOutboundIPRanges is '*' */
	POD_INCLUDE_LOOPBACK = 64,     /* an included range is loopback: A4 and A7 do not hold */
	POD_INBOUND = 128,             /* what comes from outside is captured */
	POD_INBOUND_ALL = 256,         /* every port that is not excluded; else those included */
	POD_PASS_NODE = 512,           /* P1 */
	POD_KEEP_SOURCE = 1024,        /* the proxy binds clients' addresses: their port is chosen, and their replies marked */
	POD_ACCELERATE = 2048,         /* where the node accelerates */
	POD_ACCELERATE_ALWAYS = 4096,  /* also where the probes were not content */
};

/*
 * pods: netns cookie → what to do with its connections. An entry is the whole enrolment: present, the pod is captured; absent, no
 * program changes anything. It is replaced as one value; lists hang on `policy`, so that a new policy is written beside the old one
 * and becomes visible, whole, by this one write.
 */
struct pod {
	__u32 policy;                  /* first part of the keys in prefixes, ports and exemptions */
	__u32 flags;                   /* enum pod_flags */
	__u32 exempt_cgroup_levels;    /* bit N: exemptions holds a cgroup at depth N below the root */
	__u32 mark_count;
	struct mark marks[MARKS_MAX];
	__u32 proxy_uid;               /* with POD_SIDECAR */
	__u32 proxy_gid;
	__be16 inbound_port;           /* the proxy's, for POD_INBOUND and for A3 and A6 */
	__be16 dns_port;               /* 0: DNS is like other traffic */
	__u32 pad;
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
	__u32 namespace_changes;       /* enum namespace_change */
	__u32 pad;
};

/* What the agent changed inside a pod's namespace, because it was not so before; undone when the pod is no longer captured. */
enum namespace_change {
	NAMESPACE_RULE4 = 1,           /* ip rule fwmark 0x111/0xfff lookup 100 */
	NAMESPACE_RULE6 = 2,
	NAMESPACE_ROUTE4 = 4,          /* ip route local default dev lo table 100 */
	NAMESPACE_ROUTE6 = 8,
	NAMESPACE_ACCEPT = 16,         /* sysctl net.ipv4.tcp_fwmark_accept, from 0 to 1 */
	NAMESPACE_REFLECT4 = 32,       /* sysctl net.ipv4.fwmark_reflect, from 0 to 1 */
	NAMESPACE_REFLECT6 = 64,
	NAMESPACE_PASSTHROUGH = 128,   /* ::6/128 on lo */
};

/*
 * prefixes: longest prefix match. One look-up answers every question about a destination: an entry has its own flags and those of
 * all prefixes that contain it.
 *
 *   {policy 3, 10.0.0.2/32}    → local
 *   {policy 3, 10.96.0.0/12}   → excluded
 *   {policy 3, 10.96.4.0/24}   → excluded, included
 */
struct prefix_key {
	__u32 bits;                    /* that count in what follows: 32 for policy and 0 to 128 of the address */
	__be32 policy;
	struct address address;
};

enum prefix_flags {
	PREFIX_LOCAL = 1,              /* routed over lo */
	PREFIX_NOT_UNICAST = 2,
	PREFIX_LOCALHOST = 4,          /* 127.0.0.1 or ::1 themselves */
	PREFIX_EXCLUDED = 8,
	PREFIX_INCLUDED = 16,
	PREFIX_INTERFACE = 32,         /* the longest route is by an excluded interface */
};

struct prefix {
	__u32 flags;                   /* enum prefix_flags */
};

/* ports: a TCP port (DNS: and UDP) that the policy names. */
struct port_key {
	__u32 policy;
	__be16 port;
	__u16 pad;
};

enum port_flags {
	PORT_OUTBOUND_EXCLUDED = 1,
	PORT_OUTBOUND_INCLUDED = 2,
	PORT_INBOUND_EXCLUDED = 4,
	PORT_INBOUND_INCLUDED = 8,
};

struct port {
	__u32 flags;                   /* enum port_flags */
};

enum exemption_kind {
	EXEMPT_UID = 1,
	EXEMPT_GID = 2,
	EXEMPT_CGROUP = 3,
	EXEMPT_INTERFACE = 4,
};

/* exemptions: a set. Ids as the initial user namespace counts them; a cgroup stands for everything below it; an interface is its index in the pod. */
struct exemption_key {
	__u32 policy;
	enum exemption_kind kind;
	__u64 id;
};

struct exemption {
	__u32 present;                 /* 1 */
};

/* addresses: longest prefix match, {10.0.0.2/32} → netns cookie. An sk_lookup program is not told which namespace it runs in. */
struct address_key {
	__u32 bits;
	struct address address;
};

/*
 * passes: connections into a pod that are not steered although they look like any other, from the moment their SYN leaves until they close.
 * Written where they start, as their source does not tell: by sockets of the node, and by the pod's proxy under a client's address.
 */
struct pass_key {
	struct address client;
	struct address server;
	__be16 client_port;
	__be16 server_port;
};

struct pass {
	enum reason reason;            /* REASON_INBOUND_BYPASS_NODE or _OWN */
};

/*
 * On connections that the proxy makes under a client's address. Istio's number for the same (its rule CONNMARK restores 0x111/0xfff), which its rules in
 * the namespace and ours have in common.
 */
enum { KEPT_SOURCE_MARK = 0x111, KEPT_SOURCE_MASK = 0xfff };

/* Even ones are for IPv4 sockets, odd ones for IPv6 sockets: however many workers the proxy has, those of one family leave the other its own. */
enum { LISTENER_SLOTS = 32 };

/*
 * listeners: the proxy's inbound listeners, by pod. Several may share a port (SO_REUSEPORT: workers, the old and the new one of an upgrade), and an
 * entry goes with its socket; the first slot that can take the connection does.
 */
struct listener_key {
	__u64 netns;
	__be16 port;
	__u16 slot;
	__u32 pad;
};

/*
 * client_ports: ports of clients, and those given to sockets that keep a client's address, until when (ns, boot clock) they are
 * not to be given out. 0: free.
 */
struct client_port_key {
	__u64 netns;
	struct address client;
	__u16 port;                    /* host order */
	__u16 pad0;
	__u32 pad1;
};

struct client_port {
	__u64 busy_until_ns;
};

/* Which pods' bytes go past the TCP stack. One write changes it, for running connections too. */
enum acceleration {
	ACCELERATION_OFF = 0,
	ACCELERATION_WHERE_ASKED = 1,  /* `auto`, and the probes were not content: pods that say `on` */
	ACCELERATION_AUTO = 2,         /* `auto`, and they were */
	ACCELERATION_ON = 3,           /* all but pods that say `off`, whatever the probes say */
};

/* node: of this node. */
struct node {
	__u64 netns;                   /* cookie of the node's own namespace; 0: unknown, and nothing passes as a probe */
	__u64 unknown_addresses;       /* inbound SYNs refused because they came to an address that no pod is known by */
	enum acceleration acceleration;
	__u32 pad;
};

enum role {
	ROLE_CLIENT = 1,               /* the application's socket, TCP */
	ROLE_PROXY = 2,                /* the socket that the proxy accepted */
	ROLE_RESOLVER = 3,             /* the application's socket, UDP: the address is the resolver that it asked last */
};

/* original_dsts: socket storage; lives and dies with the socket, so nothing has to be cleaned up and nothing can be evicted. */
struct original_dst {
	struct address address;
	__be16 port;
	__u16 in_pod;                  /* of the target it was sent to */
	enum role role;
	__u64 netns;                   /* of the pod */
	__be16 dns_port;               /* ROLE_RESOLVER: where the question really went, and the answer comes from */
	__u16 pad0;
	__u32 pad1;
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

/*
 * What decides about a connection, wherever it was read. The programs decide from this alone, so that the same question can be asked
 * without a connection (`explain`) and about one that exists (`sockets`).
 */
struct flow {
	__u64 netns;
	struct address source;         /* outbound: what the socket is bound to, or none */
	struct address destination;    /* as the application gave it */
	__be16 source_port;
	__be16 destination_port;
	__u32 protocol;                /* IPPROTO_TCP or _UDP */
	__u32 mark;
	__u32 uid;
	__u32 gid;
	__u32 interface;               /* index: outbound, what the socket is bound to; inbound, where it arrived; 0: none */
	__u32 in_exempt_cgroup;
	__u32 pad;
};

/* The packet that `explain` is run on, and gives back. */
struct question {
	__u8 pad[16];                  /* the kernel wants an Ethernet header here */
	struct flow flow;
	enum reason outbound;
	enum reason inbound;           /* REASONS: nothing on the way in is captured in this pod */
};

/* What `sockets` writes for each TCP socket of the namespace that it is run in. */
struct socket_record {
	struct address local;
	struct address remote;
	__u16 local_port;              /* host order */
	__u16 remote_port;
	__u32 state;                   /* TCP_ESTABLISHED is 1, TCP_LISTEN 10 */
	__u32 uid;
	__u32 mark;
	enum reason outbound;          /* what would be decided if it were made now, as a client and as a server */
	enum reason inbound;
	__u32 role;                    /* enum role; 0: not captured */
	__u32 ipv6_socket;             /* 1: an AF_INET6 socket */
	struct address original;
	__be16 original_port;
	__u16 pad0;
	__u32 accelerated;             /* 1: the fields below hold */
	__u32 on_tcp;                  /* as in struct acceleration_of */
	__u32 pad1;
	__u64 redirected_bytes;
	__u64 passed_bytes;
	__u64 fallbacks;
};

/* Why a message goes by TCP although its pair is accelerated. */
enum tcp_reason {
	TCP_OFF,                       /* switched off for the pod or the node */
	TCP_FULL,                      /* the receiver has not read what it has */
	TCP_UNDRAINED,                 /* earlier bytes went by TCP, and are not all read yet: to go past them would reorder */
	TCP_PEER_GONE,
	TCP_BLOCKING,                  /* the receiver's socket has lost O_NONBLOCK */
	TCP_REASONS,
};

/*
 * acceleration_of: socket storage, of both sockets of a pair. `peer` is a struct tcp_sock: only ever read as memory that may be anything by now,
 * and believed as long as the cookie in it is peer_cookie. Bytes are sent by peer_cookie, which the kernel keeps.
 */
struct acceleration_of {
	__u64 netns;                   /* of the pod that the socket is in */
	__u64 cookie;
	__u64 peer_cookie;
	__u64 peer;
	__u32 accepted;                /* 1: this end was accepted */
	__u32 on_tcp;                  /* 0: its messages are redirected; else 1 + the tcp_reason of the last one */
	__u32 burst_bytes;             /* redirected since the receiver was last seen to have read everything */
	__u32 burst_messages;
	__u64 redirected_bytes;
	__u64 redirected_messages;
	__u64 passed_bytes;
	__u64 passed_messages;
	__u64 fallbacks;               /* times it went from redirecting to TCP */
};

struct volume {
	__u64 bytes;
	__u64 messages;
};

/* traffic: netns cookie → one of these per CPU. Of accelerated pairs only. */
struct direction {
	struct volume redirected;
	struct volume passed[TCP_REASONS];
};

struct traffic {
	struct direction sent_by_client;
	struct direction sent_by_server;
};

/* requests: a pair has shown that it is chatty. From the end that connected. */
struct request {
	__u64 netns;
	__u64 peer_netns;
	struct address local;
	struct address remote;
	__be16 local_port;
	__be16 remote_port;
	__u32 pad;
};

/* One socket of a pair as `pair` found it. */
struct pair_end {
	__u64 cookie;                  /* 0: not looked for yet */
	__u64 sock;
	__u32 snd_una;
	__u32 snd_nxt;
	__u32 rcv_nxt;
	__u32 pad;
};

enum { PAIR_CLIENT = 1, PAIR_SERVER = 2 };

/* The packet that `pair` is run on: once for each namespace that has an end of the pair, once more in the first of two, and once to count. */
struct pairing {
	__u8 pad0[16];
	struct request request;
	struct pair_end client;
	struct pair_end server;
	__u32 here;                    /* PAIR_… bits: whose namespace this is; 0: `outcome` is to be counted */
	enum reason outcome;           /* REASON_ACCELERATED, or why not */
};

/* The packet that `add_counts` is run on. */
struct carried {
	__u8 pad[16];
	__u64 netns;
	struct counters counters;
	struct traffic traffic;
};

/* What `join` writes for each socket. */
struct joined {
	enum reason outcome;
};

/* build: which object runs. An upgrade makes it anew, so that its BTF describes the whole layout. */
struct build {
	__u32 layout;
	char version[28];
	char object_sha256[68];
};

#endif
