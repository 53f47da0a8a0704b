/*
 * ztunnel [--sidecar] [--brief]: stands in for the proxy in a pod. 15001 relays to the original destination; 15006 too, from the client's own address
 * (ztunnel) or from 127.0.0.6 or ::6 (--sidecar: Envoy, without mark and privilege); 15008 says hello and echoes; 15053 answers DNS. One JSON line for
 * each connection and DNS query, or with --brief only their number, at SIGUSR1 and at the end.
 *
 * Reads as tokio does, by edge-triggered epoll: a read or write that is short counts as drained, and nothing is tried before the next edge.
 *
 * ztunnel --zds PATH [--brief] [--retry MS] [--nack TEXT] [--late MS] [--misbehave mute|garbage|oversized|twice|fd] [--die-after N]: does so in every namespace that
 * it is told of, and prints what it is told. As ztunnel does, it keeps what it has while it is disconnected, tries a namespace again that it could not serve
 * (every 5 s; --retry), ends with 3 for Keep, Del or the snapshot's end at the wrong time, and drains at SIGTERM: no listeners any more, up to 5 s for what runs.
 * --nack refuses every Add; --late answers so late; --misbehave is how it answers after the first Add.
 */
#include <sched.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <time.h>

#include "dns.h"
#include "zds.h"

enum { ZDS = 0, OUTBOUND = 15001, INBOUND = 15006, TUNNEL = 15008, DNS = 15053 };
enum { MARK = 0x539, TURN_EVENTS = 64 };
enum { BACKOFF_MAX_MS = 200, DRAIN_MS = 5000 };

static const struct {
	const char *address;
	int type;
} LISTENERS[] = {
	{"[::]:15001", SOCK_STREAM},	  {"[::]:15006", SOCK_STREAM},	    {"[::]:15008", SOCK_STREAM},    {"127.0.0.1:15053", SOCK_STREAM},
	{"[::1]:15053", SOCK_STREAM}, {"127.0.0.1:15053", SOCK_DGRAM}, {"[::1]:15053", SOCK_DGRAM},
};
enum { LISTENER_COUNT = sizeof(LISTENERS) / sizeof(*LISTENERS) };

/* A namespace with its listeners; the process' own has no fd. */
struct workload {
	char uid[ZDS_TEXT_MAX];
	int netns;
	ino_t inode;
	bool serves, in_snapshot;
	struct half *listeners[LISTENER_COUNT];
	struct workload *next;
};

/* A listening socket, or one direction of a relayed connection; an echoed one is its own other side. */
struct half {
	int fd, port;
	bool listens, datagrams;
	bool connecting, readable, writable, closed, read_ended, write_ended;
	size_t held;
	struct half *other;
	/* Of a listener. */
	struct workload *workload;
	char buffer[16384];
};

static int epoll;
static bool sidecar, brief;
static unsigned long long accepted, closed, queries;
static volatile sig_atomic_t asked, ending;
/* Freed after the turn, as later events of it may name them; linked by `other`. */
static struct half *ended;

static struct {
	const char *path, *nack, *misbehave;
	long retry_ms, late_ms, die_after;
} options = {.retry_ms = 5000, .die_after = -1};

static struct workload *workloads, *entered;
static struct half *zds;
static bool snapshot_received;
/* On the clock of now_ms(); 0 is never. */
static long connect_at, backoff_ms, retry_at, drained_at;

static long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* New sockets are the namespace's. There is but one thread. */
static void enter(struct workload *workload)
{
	if (workload == entered || workload->netns < 0)
		return;
	if (setns(workload->netns, CLONE_NEWNET)) {
		perror("setns");
		exit(1);
	}
	entered = workload;
}

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
	half->other = ended;
	ended = half;
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

	if (listener->fd < 0)
		return;
	enter(listener->workload);
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

static void close_listeners(struct workload *workload)
{
	for (int i = 0; i < LISTENER_COUNT; i++) {
		if (workload->listeners[i])
			end_one(workload->listeners[i]);
		workload->listeners[i] = NULL;
	}
	workload->serves = false;
}

/* NULL, or the address that could not be served; errno tells why, and nothing listens then. */
static const char *open_listeners(struct workload *workload)
{
	enter(workload);
	for (int i = 0; i < LISTENER_COUNT; i++) {
		const char *address = LISTENERS[i].address;
		bool datagrams = LISTENERS[i].type == SOCK_DGRAM;
		int port = atoi(strrchr(address, ':') + 1), fd;

		if (sidecar && port == TUNNEL)
			continue;
		fd = datagrams ? try_socket_at(address, SOCK_DGRAM, prepare_listener) : try_listen_at(address, prepare_listener);
		if (fd < 0) {
			int error = errno;

			close_listeners(workload);
			errno = error;
			return address;
		}
		workload->listeners[i] = half_of(fd, port);
		workload->listeners[i]->listens = true;
		workload->listeners[i]->datagrams = datagrams;
		workload->listeners[i]->workload = workload;
		watch(workload->listeners[i], EPOLLIN);
	}
	workload->serves = true;
	return NULL;
}

static void drop_workload(struct workload **at)
{
	struct workload *workload = *at;

	*at = workload->next;
	close_listeners(workload);
	close(workload->netns);
	if (entered == workload)
		entered = NULL;
	free(workload);
}

static struct workload **find_workload(const char *uid)
{
	struct workload **at = &workloads;

	while (*at && strcmp((*at)->uid, uid))
		at = &(*at)->next;
	return at;
}

/* Empty when its listeners are bound. */
static void serve_workload(struct workload *workload, char *error, size_t size)
{
	const char *failed = options.nack ? NULL : open_listeners(workload);

	error[0] = 0;
	if (options.nack)
		snprintf(error, size, "%s", options.nack);
	else if (failed)
		snprintf(error, size, "failure to start proxy: %s: %s", failed, errno_name(errno));
	if (error[0])
		retry_at = now_ms() + options.retry_ms;
}

static void add_workload(const struct zds_request *request, char *error, size_t size)
{
	struct workload **at = find_workload(request->uid), *workload = *at;
	struct stat status;

	fstat(request->netns, &status);
	printf("{\"zds\":\"add\",\"uid\":\"%s\",\"name\":\"%s\",\"namespace\":\"%s\",\"service_account\":\"%s\",\"inode\":%lu}\n", request->uid, request->name,
	       request->namespace, request->service_account, (unsigned long)status.st_ino);
	if (workload && workload->inode != status.st_ino) {
		drop_workload(at);
		workload = NULL;
	}
	if (workload) {
		close(request->netns);
	} else {
		workload = calloc(1, sizeof(*workload));
		snprintf(workload->uid, sizeof(workload->uid), "%s", request->uid);
		workload->netns = request->netns;
		workload->inode = status.st_ino;
		workload->next = workloads;
		workloads = workload;
	}
	workload->in_snapshot = true;
	error[0] = 0;
	if (!workload->serves)
		serve_workload(workload, error, size);
}

static void out_of_order(const char *what)
{
	fprintf(stderr, "protocol error: %s\n", what);
	exit(3);
}

static void obey(const struct zds_request *request, char *error, size_t size)
{
	struct workload **at;
	int count = 0;

	error[0] = 0;
	switch (request->kind) {
	case ZDS_ADD:
		return add_workload(request, error, size);
	case ZDS_KEEP:
		printf("{\"zds\":\"keep\",\"uid\":\"%s\"}\n", request->uid);
		if (snapshot_received)
			out_of_order("Keep after the snapshot");
		at = find_workload(request->uid);
		if (*at)
			(*at)->in_snapshot = true;
		return;
	case ZDS_DELETE:
		printf("{\"zds\":\"delete\",\"uid\":\"%s\"}\n", request->uid);
		if (!snapshot_received)
			out_of_order("Del before the snapshot's end");
		at = find_workload(request->uid);
		if (*at)
			drop_workload(at);
		return;
	case ZDS_SNAPSHOT_SENT:
		if (snapshot_received)
			out_of_order("a second snapshot");
		snapshot_received = true;
		for (at = &workloads; *at;) {
			if (!(*at)->in_snapshot) {
				drop_workload(at);
				continue;
			}
			count++;
			at = &(*at)->next;
		}
		printf("{\"zds\":\"snapshot\",\"workloads\":%d}\n", count);
		return;
	}
	zds_malformed("kind");
}

static void answer_zds(const char *error)
{
	static const uint8_t garbage[] = {1, 2, 3}, oversized[5000];
	const char *how = workloads && options.misbehave ? options.misbehave : "";

	if (options.late_ms)
		usleep(options.late_ms * 1000);
	if (!strcmp(how, "mute"))
		return;
	if (!strcmp(how, "garbage"))
		send(zds->fd, garbage, sizeof(garbage), MSG_NOSIGNAL);
	else if (!strcmp(how, "oversized"))
		send(zds->fd, oversized, sizeof(oversized), MSG_NOSIGNAL);
	else if (!strcmp(how, "fd"))
		zds_answer_with_fd(zds->fd);
	else
		zds_answer(zds->fd, error);
	if (!strcmp(how, "twice"))
		zds_answer(zds->fd, error);
}

static void zds_disconnect(void)
{
	if (!zds)
		return;
	end_one(zds);
	zds = NULL;
	puts("{\"zds\":\"disconnected\"}");
}

static void zds_turn(void)
{
	static int received;
	struct zds_request request;
	char error[100];
	int got;

	if (!zds)
		return;
	got = zds_receive(zds->fd, &request);
	if (got < 0 && errno == EAGAIN)
		return;
	if (got <= 0) {
		zds_disconnect();
		connect_at = now_ms();
		return;
	}
	if (++received == options.die_after)
		kill(getpid(), SIGKILL);
	obey(&request, error, sizeof(error));
	answer_zds(error);
}

static void zds_try_connect(void)
{
	int fd = zds_connect(options.path);

	if (fd < 0) {
		backoff_ms = backoff_ms < BACKOFF_MAX_MS / 2 ? 2 * backoff_ms : BACKOFF_MAX_MS;
		connect_at = now_ms() + backoff_ms;
		return;
	}
	backoff_ms = 10;
	connect_at = 0;
	snapshot_received = false;
	for (struct workload **at = &workloads; *at;) {
		(*at)->in_snapshot = false;
		if ((*at)->serves)
			at = &(*at)->next;
		else
			drop_workload(at);
	}
	zds = half_of(fd, ZDS);
	watch(zds, EPOLLIN);
	puts("{\"zds\":\"connected\"}");
}

static void retry_workloads(void)
{
	char error[100];

	retry_at = 0;
	for (struct workload *workload = workloads; workload; workload = workload->next) {
		if (!workload->serves)
			serve_workload(workload, error, sizeof(error));
		if (workload->serves)
			continue;
		printf("{\"zds\":\"retry\",\"uid\":\"%s\",\"error\":\"%s\"}\n", workload->uid, error);
	}
}

static void drain(void)
{
	zds_disconnect();
	connect_at = retry_at = 0;
	while (workloads)
		drop_workload(&workloads);
	drained_at = now_ms() + DRAIN_MS;
	puts("{\"draining\":true}");
}

static bool is_due(long *at)
{
	if (!*at || now_ms() < *at)
		return false;
	*at = 0;
	return true;
}

static int wait_ms(void)
{
	long times[] = {connect_at, retry_at, drained_at}, first = 0, left;

	for (int i = 0; i < 3; i++) {
		if (times[i] && (!first || times[i] < first))
			first = times[i];
	}
	left = first - now_ms();
	return !first ? -1 : left > 0 ? left : 0;
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
	static struct workload here = {.netns = -1};
	struct sigaction action = {.sa_handler = on_signal};
	sigset_t none, handled;

	prepare_process();
	for (int i = 1; i < argc; i++) {
		const char *name = argv[i];

		if (!strcmp(name, "--sidecar"))
			sidecar = true;
		else if (!strcmp(name, "--brief"))
			brief = true;
		else if (++i >= argc)
			misuse(name);
		else if (!strcmp(name, "--zds"))
			options.path = argv[i];
		else if (!strcmp(name, "--retry"))
			options.retry_ms = atol(argv[i]);
		else if (!strcmp(name, "--nack"))
			options.nack = argv[i];
		else if (!strcmp(name, "--late"))
			options.late_ms = atol(argv[i]);
		else if (!strcmp(name, "--misbehave"))
			options.misbehave = argv[i];
		else if (!strcmp(name, "--die-after"))
			options.die_after = atol(argv[i]);
		else
			misuse(name);
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
	if (options.path) {
		connect_at = now_ms();
		backoff_ms = 10;
	} else {
		const char *failed = open_listeners(&here);

		if (failed)
			or_exit(-1, failed);
	}
	puts("{\"ready\":true}");
	while (!ending || drained_at) {
		struct epoll_event events[TURN_EVENTS];
		int got = epoll_pwait(epoll, events, TURN_EVENTS, wait_ms(), &none);

		for (int i = 0; i < got; i++) {
			struct half *half = events[i].data.ptr;

			if (half->port == ZDS)
				zds_turn();
			else if (half->listens && half->datagrams)
				answer_datagrams(half);
			else if (half->listens)
				accept_all(half);
			else if (half->port == DNS)
				answer_stream(half);
			else
				turn(half, events[i].events);
		}
		while (ended) {
			struct half *half = ended;

			ended = half->other;
			free(half);
		}
		if (asked)
			print_counts();
		if (ending && options.path && !drained_at)
			drain();
		if (is_due(&drained_at) || (drained_at && accepted == closed))
			break;
		if (is_due(&connect_at))
			zds_try_connect();
		if (is_due(&retry_at))
			retry_workloads();
	}
	print_counts();
	return 0;
}
