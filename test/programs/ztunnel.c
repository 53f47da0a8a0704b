/*
 * ztunnel [--sidecar] [--brief]: stands in for the proxy in a pod. 15001 relays to the original destination; 15006 too, from the client's own address
 * (ztunnel) or from 127.0.0.6 or ::6 (--sidecar: Envoy, without mark and privilege); 15008 says hello and echoes; 15053 answers DNS. One JSON line for
 * each connection and DNS query, or with --brief only their number, at SIGUSR1 and at the end.
 *
 * Reads as tokio does, by edge-triggered epoll: a read or write that is short counts as drained, and nothing is tried before the next edge.
 */
#include <stddef.h>
#include <sys/epoll.h>

#include "dns.h"

enum { OUTBOUND = 15001, INBOUND = 15006, TUNNEL = 15008, DNS = 15053 };
enum { MARK = 0x539, TURN_EVENTS = 64 };

/* A listening socket, or one direction of a relayed connection; an echoed one is its own other side. */
struct half {
	int fd, port;
	bool listens, datagrams;
	bool connecting, readable, writable, closed, read_ended, write_ended;
	size_t held;
	struct half *other;
	char buffer[16384];
};

static int epoll;
static bool sidecar, brief;
static unsigned long long accepted, closed, queries;
static volatile sig_atomic_t asked, ending;
/* Freed after the turn, as later events of it may name them. */
static struct half *ended[2 * TURN_EVENTS];
static int ended_count;

static void prepare_upstream(int fd)
{
	int mark = MARK;

	if (!sidecar && setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof(mark))) {
		perror("SO_MARK");
		exit(1);
	}
}

static void prepare_listener(int fd)
{
	int on = 1;

	prepare_upstream(fd);
	setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
	if (!sidecar && setsockopt(fd, SOL_IP, IP_TRANSPARENT, &on, sizeof(on))) {
		perror("IP_TRANSPARENT");
		exit(1);
	}
}

/* As ztunnel and Envoy ask; `from` tells who answered. */
static union address original_dst(int fd, const char **from)
{
	union address address = {0};
	socklen_t size = sizeof(address.in);

	*from = "ip";
	if (!getsockopt(fd, SOL_IP, SO_ORIGINAL_DST, &address, &size))
		return address;
	*from = "ipv6";
	size = sizeof(address.in6);
	if (!getsockopt(fd, SOL_IPV6, SO_ORIGINAL_DST, &address, &size))
		return unmapped(address);
	*from = "sockname";
	size = sizeof(address);
	getsockname(fd, &address.any, &size);
	return unmapped(address);
}

static uint16_t port_of(const union address *address)
{
	return ntohs(address->any.sa_family == AF_INET ? address->in.sin_port : address->in6.sin6_port);
}

static bool same_host(const union address *a, const union address *b)
{
	if (a->any.sa_family != b->any.sa_family)
		return false;
	return a->any.sa_family == AF_INET ? a->in.sin_addr.s_addr == b->in.sin_addr.s_addr : !memcmp(&a->in6.sin6_addr, &b->in6.sin6_addr, 16);
}

/* What would make the proxy connect to itself without end. */
static bool is_self_call(const struct half *listener, int fd, const union address *destination)
{
	union address own = {0};
	socklen_t size = sizeof(own);
	uint16_t port = port_of(destination);

	if (listener->port == INBOUND)
		return port == INBOUND || (!sidecar && (port == OUTBOUND || port == TUNNEL));
	getsockname(fd, &own.any, &size);
	own = unmapped(own);
	return port == OUTBOUND && same_host(&own, destination);
}

static void report(const char *protocol, const struct half *listener, const char *peer, const char *local, const union address *destination, const char *from,
		   int upstream)
{
	char to[TEXT_MAX] = "", source[TEXT_MAX] = "";

	if (brief)
		return;
	if (destination)
		format_address(destination, to);
	if (upstream >= 0)
		name_of(upstream, getsockname, source);
	printf("{\"listener\":%d,\"protocol\":\"%s\",\"peer\":\"%s\",\"local\":\"%s\",\"original_dst\":\"%s\",\"from\":\"%s\",\"upstream_local\":\"%s\"}\n",
	       listener->port, protocol, peer, local, to, from, source);
}

static struct half *half_of(int fd, int port)
{
	struct half *half = malloc(sizeof(*half));

	memset(half, 0, offsetof(struct half, buffer));
	half->fd = fd;
	half->port = port;
	half->other = half;
	return half;
}

static void watch(struct half *half, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.ptr = half};

	epoll_ctl(epoll, EPOLL_CTL_ADD, half->fd, &event);
}

static void end_one(struct half *half)
{
	close(half->fd);
	half->fd = -1;
	ended[ended_count++] = half;
}

static void end(struct half *half)
{
	struct half *other = half->other;

	end_one(half);
	if (other != half)
		end_one(other);
	closed++;
}

/* Moves what can be moved from `from` to its other side; false when the connection broke. */
static bool pump(struct half *from)
{
	struct half *to = from->other;

	for (;;) {
		if (from->held == 0 && from->readable && !from->read_ended) {
			ssize_t got = read(from->fd, from->buffer, sizeof(from->buffer));

			if (got < 0 && errno != EAGAIN)
				return false;
			from->read_ended = got == 0;
			from->held = got > 0 ? got : 0;
			if (got < (ssize_t)sizeof(from->buffer) && !from->closed)
				from->readable = false;
		}
		if (from->held > 0 && to->writable) {
			ssize_t done = write(to->fd, from->buffer, from->held);

			if (done < 0 && errno != EAGAIN)
				return false;
			done = done > 0 ? done : 0;
			to->writable = (size_t)done == from->held;
			memmove(from->buffer, from->buffer + done, from->held - done);
			from->held -= done;
		}
		if (from->held > 0 ? !to->writable : !from->readable || from->read_ended)
			break;
	}
	if (from->read_ended && from->held == 0 && !to->write_ended && !to->connecting) {
		shutdown(to->fd, SHUT_WR);
		to->write_ended = true;
	}
	return true;
}

static void turn(struct half *half, uint32_t events)
{
	int error = 0;
	socklen_t size = sizeof(error);

	if (half->fd < 0)
		return;
	if (half->connecting) {
		getsockopt(half->fd, SOL_SOCKET, SO_ERROR, &error, &size);
		if (error)
			return end(half);
		half->connecting = !(events & EPOLLOUT);
	}
	if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		half->closed = true;
	half->readable |= half->closed || (events & EPOLLIN);
	half->writable |= !half->connecting && (events & EPOLLOUT);
	if (!pump(half) || !pump(half->other) || (half->read_ended && half->other->read_ended && half->held == 0 && half->other->held == 0))
		end(half);
}

static const uint32_t RELAY_EVENTS = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;

/* A connected socket on its way to `destination`, from `client`'s address when that is given; -1 when there is none. */
static int connect_upstream(const union address *destination, const union address *client)
{
	int fd = socket(destination->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
	union address source = client ? *client : (union address){0};

	prepare_upstream(fd);
	/* Like ztunnel's: the source is left to the kernel when the client is the destination itself, and a bind that fails is not an error. */
	if (client && (sidecar || !same_host(client, destination))) {
		source.in.sin_port = 0;
		if (!sidecar) {
			setsockopt(fd, source.any.sa_family == AF_INET ? SOL_IP : SOL_IPV6, source.any.sa_family == AF_INET ? IP_TRANSPARENT : IPV6_TRANSPARENT, &on, sizeof(on));
			setsockopt(fd, source.any.sa_family == AF_INET ? SOL_IP : SOL_IPV6, source.any.sa_family == AF_INET ? IP_FREEBIND : IPV6_FREEBIND, &on, sizeof(on));
		}
		if (bind(fd, &source.any, address_size(&source)))
			perror("bind");
	}
	if (connect(fd, &destination->any, address_size(destination)) && errno != EINPROGRESS) {
		close(fd);
		return -1;
	}
	return fd;
}

static union address source_of(int fd, const union address *destination)
{
	union address address = {0};
	socklen_t size = sizeof(address);

	if (sidecar)
		return parse_address(destination->any.sa_family == AF_INET ? "127.0.0.6:0" : "[::6]:0");
	getpeername(fd, &address.any, &size);
	return unmapped(address);
}

static void relay(const struct half *listener, int fd, const char *peer, const char *local)
{
	const char *from;
	union address destination = original_dst(fd, &from), client = source_of(fd, &destination);
	int upstream = -1;
	struct half *a, *b;

	if (!is_self_call(listener, fd, &destination))
		upstream = connect_upstream(&destination, listener->port == INBOUND ? &client : NULL);
	report("tcp", listener, peer, local, &destination, from, upstream);
	if (upstream < 0) {
		close(fd);
		closed++;
		return;
	}
	a = half_of(fd, listener->port);
	b = half_of(upstream, listener->port);
	a->other = b;
	b->other = a;
	b->connecting = true;
	watch(a, RELAY_EVENTS);
	watch(b, RELAY_EVENTS);
}

static void echo(const struct half *listener, int fd, const char *peer, const char *local)
{
	struct half *half = half_of(fd, listener->port);

	report("tcp", listener, peer, local, NULL, "", -1);
	half->held = snprintf(half->buffer, sizeof(half->buffer), "{\"server\":\"%s\",\"peer\":\"%s\"}\n", local, peer);
	watch(half, RELAY_EVENTS);
}

static void accept_all(const struct half *listener)
{
	char peer[TEXT_MAX], local[TEXT_MAX];
	int fd;

	while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		accepted++;
		name_of(fd, getpeername, peer);
		name_of(fd, getsockname, local);
		if (listener->port == TUNNEL) {
			echo(listener, fd, peer, local);
		} else if (listener->port == DNS) {
			report("tcp", listener, peer, local, NULL, "", -1);
			watch(half_of(fd, DNS), EPOLLIN);
		} else {
			relay(listener, fd, peer, local);
		}
	}
}

static void answer_datagrams(const struct half *listener)
{
	char peer[TEXT_MAX], local[TEXT_MAX];

	while (dns_serve_datagram(listener->fd, "ztunnel", peer)) {
		queries++;
		report("udp", listener, peer, name_of(listener->fd, getsockname, local), NULL, "", -1);
	}
}

static void answer_stream(struct half *half)
{
	char peer[TEXT_MAX];

	if (half->fd < 0)
		return;
	dns_serve_stream(half->fd, "ztunnel", name_of(half->fd, getpeername, peer));
	end(half);
}

static void listen_on(const char *address, int type)
{
	struct half *half = half_of(type == SOCK_STREAM ? listen_prepared(address, prepare_listener) : socket_at(address, type, prepare_listener),
				    atoi(strrchr(address, ':') + 1));

	half->listens = true;
	half->datagrams = type == SOCK_DGRAM;
	watch(half, EPOLLIN);
}

static void on_signal(int signal)
{
	if (signal == SIGUSR1)
		asked = true;
	else
		ending = true;
}

static void print_counts(void)
{
	printf("{\"accepted\":%llu,\"queries\":%llu,\"open\":%llu}\n", accepted, queries, accepted - closed);
	asked = 0;
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_signal};
	sigset_t none, handled;

	prepare_process();
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--sidecar"))
			sidecar = true;
		else if (!strcmp(argv[i], "--brief"))
			brief = true;
		else
			misuse(argv[i]);
	}
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	/* Delivered only while it waits: one that came just before would not end the wait. */
	sigemptyset(&none);
	sigemptyset(&handled);
	sigaddset(&handled, SIGUSR1);
	sigaddset(&handled, SIGTERM);
	sigprocmask(SIG_BLOCK, &handled, NULL);
	epoll = epoll_create1(EPOLL_CLOEXEC);
	listen_on("[::]:15001", SOCK_STREAM);
	listen_on("[::]:15006", SOCK_STREAM);
	if (!sidecar)
		listen_on("[::]:15008", SOCK_STREAM);
	for (int type = SOCK_STREAM; type <= SOCK_DGRAM; type++) {
		listen_on("127.0.0.1:15053", type);
		listen_on("[::1]:15053", type);
	}
	puts("{\"ready\":true}");
	while (!ending) {
		struct epoll_event events[TURN_EVENTS];
		int got = epoll_pwait(epoll, events, TURN_EVENTS, -1, &none);

		for (int i = 0; i < got; i++) {
			struct half *half = events[i].data.ptr;

			if (half->listens && half->datagrams)
				answer_datagrams(half);
			else if (half->listens)
				accept_all(half);
			else if (half->port == DNS)
				answer_stream(half);
			else
				turn(half, events[i].events);
		}
		while (ended_count > 0)
			free(ended[--ended_count]);
		if (asked)
			print_counts();
	}
	print_counts();
	return 0;
}
