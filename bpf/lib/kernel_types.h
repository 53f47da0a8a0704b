/* SPDX-License-Identifier: Dual MIT/GPL */
/* The few kernel fields that no context shows. CO-RE moves each access to where the running kernel has it. */
#ifndef SIDESTEP_KERNEL_TYPES_H
#define SIDESTEP_KERNEL_TYPES_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	__u32 val;
} kuid_t;

typedef struct {
	__u32 val;
} kgid_t;

struct cred {
	kuid_t fsuid;
	kgid_t fsgid;
};

struct file {
	unsigned int f_flags;
	const struct cred *f_cred;
};

struct socket {
	struct file *file;
};

struct net {
	__u64 net_cookie;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	union {
		__be32 u6_addr32[4];
	} in6_u;
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	struct {
		__s64 counter;
	} skc_cookie;
};

typedef struct {
	int owned;
} socket_lock_t;

struct sock {
	struct sock_common __sk_common;
	socket_lock_t sk_lock;
	struct socket *sk_socket;
	void *sk_user_data;
	__u32 sk_mark;
};

struct inet_sock {
	struct sock sk;
	int mc_index;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	const void *icsk_ulp_ops;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 rcv_nxt;
	__u32 copied_seq;
	__u32 write_seq;
	__u32 snd_una;
	__u32 snd_nxt;
};

struct ipv6_pinfo {
	int mcast_oif;
};

struct tcp6_sock {
	struct ipv6_pinfo inet6;
};

struct list_head {
	struct list_head *next;
};

struct sk_buff_head {
	__u32 qlen;
};

/* What a socket in a sockmap has at sk_user_data. */
struct sk_psock {
	struct sk_buff_head ingress_skb;
	struct list_head ingress_msg;
};

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
};

/* The context of an iter/tcp program. */
struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
	unsigned int uid;
};

/* The context of an iter/bpf_sk_storage_map program. */
struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct sock *sk;
	void *value;
};

/* 5.17 */
struct bpf_sk_lookup___arrival {
	__u32 ingress_ifindex;
};

#pragma clang attribute pop

#endif
