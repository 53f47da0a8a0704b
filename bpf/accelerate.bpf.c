/* SPDX-License-Identifier: Dual MIT/GPL */
/*
 * Bytes between two sockets of this node, past the TCP stack.
 *
 *   established        nothing, but that the client's round trips are watched             sockops
 *   16 exchanges       the pair is worth it: the agent is asked                           RTT_CB → requests
 *   agent              finds both sockets, makes sure that they are peers                 pair, inside their namespaces
 *                      and joins them                                                     join
 *   each message       redirected to the peer, or by TCP                                  move_bytes
 *
 * Order holds by one rule. A socket's messages go by TCP or are redirected, and it may change from TCP to redirecting only when everything that went by TCP
 * was acknowledged and read: sender's write_seq == snd_una == receiver's rcv_nxt == copied_seq. That the sender's numbers are the receiver's also shows, each time,
 * that the two are one connection. From redirecting to TCP it may change at any time: what was redirected is read first.
 *
 * one_queue puts bytes that come by TCP behind the redirected ones. Else a reader that takes a short read for "nothing left" would sleep on one of two queues.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/decide.h"
#include "lib/endpoints.h"

#define O_NONBLOCK 04000

/* A connection that has exchanged this many segments each way is chatty; ... */
enum { CHATTY_SEGMENTS = 16 };
/* ... one that has not after so many is not watched any longer. */
enum { WATCHED_SEGMENTS = 4096 };

/*
 * What may lie unread with the receiver. The kernel does not bound it at all, and a message of one byte costs about a kilobyte, so messages are counted
 * too.
 */
enum { BURST_BYTES = 1 << 20, BURST_MESSAGES = 256 };

/* Sequence numbers are read while both ends go on: how far apart those of one connection can be. */
enum { SEQUENCE_SLACK = 1 << 20 };

static __always_inline bool accelerates(const struct pod *pod)
{
	__u32 zero = 0;
	struct node *this_node = bpf_map_lookup_elem(&node, &zero);

	if (!this_node || !pod || !(pod->flags & POD_ACCELERATE))
		return false;
	if (this_node->acceleration == ACCELERATION_WHERE_ASKED)
		return pod->flags & POD_ACCELERATE_ALWAYS;
	return this_node->acceleration != ACCELERATION_OFF;
}

/* Where the other end of a pod's connection is; 0: not on this node, or not in a pod that is known. */
static __always_inline __u64 peer_netns(struct bpf_sock_ops *ctx, __u64 netns, const struct endpoints *ends)
{
	struct original_dst *original = original_of(ctx, ROLE_CLIENT);

	if (is_loopback(&ends->remote) || (original && original->in_pod))
		return netns;
	return pod_at(&ends->remote);
}

/* sockops ACTIVE_ESTABLISHED_CB. */
static __always_inline void on_connected(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	struct endpoints ends;

	if (!accelerates(pod))
		return;
	endpoints_of(ctx, &ends);
	if (!peer_netns(ctx, netns, &ends))
		return;
	bpf_get_socket_cookie(ctx);
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTT_CB_FLAG);
}

/* sockops RTT_CB: about once in an exchange. */
static __always_inline void on_round_trip(struct bpf_sock_ops *ctx)
{
	__u32 sent = ctx->data_segs_out, received = ctx->data_segs_in;
	struct request *request;
	struct endpoints ends;
	__u64 netns;

	if (sent < CHATTY_SEGMENTS || received < CHATTY_SEGMENTS) {
		if (sent + received > WATCHED_SEGMENTS)
			bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_RTT_CB_FLAG);
		return;
	}
	netns = bpf_get_netns_cookie(ctx);
	request = bpf_ringbuf_reserve(&requests, sizeof(*request), 0);
	if (!request) {
		count(netns, REASON_UNACCELERATED_UNHEARD);
		return;
	}
	endpoints_of(ctx, &ends);
	request->netns = netns;
	request->peer_netns = peer_netns(ctx, netns, &ends);
	request->local = ends.local;
	request->remote = ends.remote;
	request->local_port = bpf_htons(ends.local_port);
	request->remote_port = bpf_htons(ends.remote_port);
	request->pad = 0;
	bpf_ringbuf_submit(request, 0);
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_RTT_CB_FLAG);
}

static __always_inline bool is_nonblocking(struct sock *sk)
{
	struct socket *socket = sk->sk_socket;
	struct file *file;

	if (!socket)
		return false;
	file = socket->file;
	return file && file->f_flags & O_NONBLOCK;
}

/*
 * The established socket with this source and destination, as seen in a packet that it would receive.
 *
 * @return to be released; NULL: there is none
 */
static __always_inline struct bpf_sock *find_socket(struct __sk_buff *ctx, const struct address *from, __be16 from_port, const struct address *to, __be16 to_port)
{
	struct bpf_sock_tuple tuple = {};

	if (is_ipv4(from)) {
		tuple.ipv4.saddr = from->word[3];
		tuple.ipv4.daddr = to->word[3];
		tuple.ipv4.sport = from_port;
		tuple.ipv4.dport = to_port;
		return bpf_sk_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	__builtin_memcpy(tuple.ipv6.saddr, from->word, sizeof(tuple.ipv6.saddr));
	__builtin_memcpy(tuple.ipv6.daddr, to->word, sizeof(tuple.ipv6.daddr));
	tuple.ipv6.sport = from_port;
	tuple.ipv6.dport = to_port;
	return bpf_sk_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
}

/* @return REASON_ACCELERATED if nothing speaks against it */
static __always_inline enum reason look_at(struct bpf_sock *found, struct pair_end *end)
{
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(found);
	struct sock *sk = (struct sock *)tcp;

	if (!tcp || sk->__sk_common.skc_state != TCP_ESTABLISHED)
		return REASON_UNACCELERATED_GONE;
	if (tcp->inet_conn.icsk_ulp_ops)
		return REASON_UNACCELERATED_ULP;
	if (!is_nonblocking(sk))
		return REASON_UNACCELERATED_BLOCKING;
	end->cookie = sk->__sk_common.skc_cookie.counter;
	end->sock = (__u64)tcp;
	end->snd_una = tcp->snd_una;
	end->snd_nxt = tcp->snd_nxt;
	end->rcv_nxt = tcp->rcv_nxt;
	/* Both have one since they were established; without it they are not from under our eyes. */
	return end->cookie ? REASON_ACCELERATED : REASON_UNACCELERATED_STRANGER;
}

/* What one end has received lies between what the other knows to be received and what it has sent. */
static __always_inline bool fits(const struct pair_end *sender, const struct pair_end *receiver)
{
	__u32 received = receiver->rcv_nxt - sender->snd_una + SEQUENCE_SLACK;
	__u32 sent = sender->snd_nxt - sender->snd_una;

	return sent < SEQUENCE_SLACK * 64 && received <= sent + 2 * SEQUENCE_SLACK;
}

static __always_inline enum reason prepare(struct bpf_sock *found, __u64 netns, const struct pair_end *own, const struct pair_end *peer, bool accepted)
{
	struct acceleration_of *mine = bpf_sk_storage_get(&acceleration_of, found, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	__u64 cookie = own->cookie;

	if (!mine)
		return REASON_UNACCELERATED_NO_ROOM;
	/* By an earlier try, in which the other end was not ready. */
	if (mine->peer_cookie == peer->cookie)
		return REASON_ACCELERATED;
	mine->netns = netns;
	mine->cookie = cookie;
	mine->peer_cookie = peer->cookie;
	mine->peer = peer->sock;
	mine->accepted = accepted;
	mine->on_tcp = 1 + TCP_UNDRAINED;
	if (bpf_sk_storage_get(&joining, found, &cookie, BPF_SK_STORAGE_GET_F_CREATE))
		return REASON_ACCELERATED;
	bpf_sk_storage_delete(&acceleration_of, found);
	return REASON_UNACCELERATED_NO_ROOM;
}

/*
 * BPF_PROG_TEST_RUN on a struct pairing, on a thread inside the namespace of one end or of both. It only chooses: since 7.3 a packet program may not put sockets into a map.
 * Without a namespace it counts what became of it all.
 */
SEC("tc")
int pair(struct __sk_buff *ctx)
{
	struct bpf_sock *client = NULL, *server = NULL;
	struct pairing pairing;
	struct request *request = &pairing.request;
	enum reason outcome = REASON_ACCELERATED;

	if (bpf_skb_load_bytes(ctx, 0, &pairing, sizeof(pairing)))
		return -EINVAL;
	if (!pairing.here) {
		count(request->netns, pairing.outcome < REASONS ? pairing.outcome : REASON_UNACCELERATED_GONE);
		return 0;
	}
	if (pairing.here & PAIR_CLIENT) {
		client = find_socket(ctx, &request->remote, request->remote_port, &request->local, request->local_port);
		outcome = client ? look_at(client, &pairing.client) : REASON_UNACCELERATED_GONE;
	}
	if (outcome == REASON_ACCELERATED && pairing.here & PAIR_SERVER) {
		server = find_socket(ctx, &request->local, request->local_port, &request->remote, request->remote_port);
		outcome = server ? look_at(server, &pairing.server) : REASON_UNACCELERATED_GONE;
	}
	if (outcome == REASON_ACCELERATED && pairing.client.cookie && pairing.server.cookie) {
		if (!fits(&pairing.client, &pairing.server) || !fits(&pairing.server, &pairing.client))
			outcome = REASON_UNACCELERATED_STRANGER;
		if (outcome == REASON_ACCELERATED && server)
			outcome = prepare(server, request->peer_netns, &pairing.server, &pairing.client, true);
		if (outcome == REASON_ACCELERATED && client)
			outcome = prepare(client, request->netns, &pairing.client, &pairing.server, false);
	}
	if (client)
		bpf_sk_release(client);
	if (server)
		bpf_sk_release(server);
	pairing.outcome = outcome;
	return bpf_skb_store_bytes(ctx, 0, &pairing, sizeof(pairing), 0);
}

/*
 * A segment of which a part was read must not be in the receive queue when one_queue begins: it would move the whole segment, and the part would be read twice.
 * So nothing may be unread before, and nothing have been read meanwhile; where something was, it has to have been read to its end. The socket is not locked here, and
 * a reader that polls without sleeping can come in between: then nobody knows, and the connection has to be reset.
 */
static __always_inline enum reason add_unread_free(struct sock *sk, __u64 cookie)
{
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(sk);
	__u32 read_before, read_after;
	/* Not long: before 6.4 map operations set the lower half of it only. */
	int error;

	/* The memory of a socket that ended may be another's. */
	if (!tcp || (__u64)sk->__sk_common.skc_cookie.counter != cookie)
		return REASON_UNACCELERATED_GONE;
	read_before = tcp->copied_seq;
	if (read_before != tcp->rcv_nxt)
		return REASON_UNACCELERATED_UNREAD;
	error = bpf_map_update_elem(&accelerated, &cookie, sk, BPF_NOEXIST);
	if (error)
		return error == -EBUSY ? REASON_UNACCELERATED_BUSY : error == -EOPNOTSUPP ? REASON_UNACCELERATED_GONE : REASON_UNACCELERATED_NO_ROOM;
	read_after = tcp->copied_seq;
	return read_after == read_before || read_after == tcp->rcv_nxt ? REASON_ACCELERATED : REASON_UNACCELERATED_RACED;
}

/* Puts the sockets that `pair` chose into `accelerated`; writes a struct joined for each. */
SEC("iter/bpf_sk_storage_map")
int join(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;
	__u64 *cookie = ctx->value;
	struct joined joined;

	if (!sk || !cookie)
		return 0;
	joined.outcome = add_unread_free(sk, *cookie);
	if (joined.outcome != REASON_ACCELERATED)
		bpf_sk_storage_delete(&acceleration_of, sk);
	bpf_sk_storage_delete(&joining, sk);
	bpf_seq_write(ctx->meta->seq, &joined, sizeof(joined));
	return 0;
}

/* Everything below `peer` may be memory of something else by now: only the last field read, the cookie, says that it was not. */
static __always_inline enum tcp_reason why_by_tcp(struct sk_msg_md *msg, struct bpf_sock *sk, struct acceleration_of *mine)
{
	struct tcp_sock *peer = (struct tcp_sock *)mine->peer;
	struct pod *pod = bpf_map_lookup_elem(&pods, &mine->netns);
	struct sock *peer_sk = (struct sock *)peer;
	struct sk_psock *queues;
	struct tcp_sock *own;
	bool is_read;

	if (!accelerates(pod))
		return TCP_OFF;
	/* Whether the receiver has read is only looked at when it begins to matter: each read of its memory costs as much as a look-up. */
	if (!mine->on_tcp && mine->burst_bytes + msg->size <= BURST_BYTES / 2 && mine->burst_messages < BURST_MESSAGES / 2)
		return TCP_REASONS;

	/* The lowest bits are flags (SK_USER_DATA_PTRMASK). */
	queues = (struct sk_psock *)((__u64)BPF_CORE_READ(peer_sk, sk_user_data) & ~7ULL);
	if (!queues)
		return TCP_PEER_GONE;
	is_read = (__u64)BPF_CORE_READ(queues, ingress_msg.next) == (__u64)queues + bpf_core_field_offset(struct sk_psock, ingress_msg) &&
		  !BPF_CORE_READ(queues, ingress_skb.qlen);
	if (is_read) {
		mine->burst_bytes = 0;
		mine->burst_messages = 0;
	}
	if (mine->burst_bytes + msg->size > BURST_BYTES || mine->burst_messages >= BURST_MESSAGES)
		return TCP_FULL;

	if (mine->on_tcp) {
		struct socket *socket = BPF_CORE_READ(peer_sk, sk_socket);

		own = bpf_skc_to_tcp_sock(sk);
		if (!own || own->write_seq != own->snd_una || BPF_CORE_READ(peer, rcv_nxt) != own->write_seq || BPF_CORE_READ(peer, copied_seq) != own->write_seq ||
		    BPF_CORE_READ(queues, ingress_skb.qlen))
			return TCP_UNDRAINED;
		if (!socket || !(BPF_CORE_READ(socket, file, f_flags) & O_NONBLOCK))
			return TCP_BLOCKING;
	}
	return (__u64)BPF_CORE_READ(peer_sk, __sk_common.skc_cookie.counter) == mine->peer_cookie ? TCP_REASONS : TCP_PEER_GONE;
}

static __always_inline void account(const struct acceleration_of *mine, enum tcp_reason reason, __u32 bytes)
{
	struct traffic *of_pod = bpf_map_lookup_elem(&traffic, &mine->netns);
	struct direction *direction;
	struct volume *volume;

	if (!of_pod)
		return;
	direction = mine->accepted ? &of_pod->sent_by_server : &of_pod->sent_by_client;
	volume = reason < TCP_REASONS ? &direction->passed[reason] : &direction->redirected;
	__sync_fetch_and_add(&volume->bytes, bytes);
	__sync_fetch_and_add(&volume->messages, 1);
}

SEC("sk_msg")
int move_bytes(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct acceleration_of *mine;
	enum tcp_reason reason;
	__u32 bytes = msg->size;

	if (!sk)
		return SK_PASS;
	mine = bpf_sk_storage_get(&acceleration_of, sk, NULL, 0);
	if (!mine)
		return SK_PASS;

	reason = why_by_tcp(msg, sk, mine);
	if (reason == TCP_REASONS && bpf_msg_redirect_hash(msg, &accelerated, &mine->peer_cookie, BPF_F_INGRESS) != SK_PASS)
		reason = TCP_PEER_GONE;
	account(mine, reason, bytes);
	if (reason == TCP_REASONS) {
		mine->on_tcp = 0;
		mine->burst_bytes += bytes;
		mine->burst_messages++;
		mine->redirected_bytes += bytes;
		mine->redirected_messages++;
	} else {
		mine->fallbacks += !mine->on_tcp;
		mine->on_tcp = 1 + reason;
		mine->passed_bytes += bytes;
		mine->passed_messages++;
	}
	/* Never what the helper said: on a miss that is SK_DROP, and the application would see EACCES. */
	return SK_PASS;
}

SEC("sk_skb/stream_verdict")
int one_queue(struct __sk_buff *ctx)
{
	(void)ctx;
	return SK_PASS;
}
