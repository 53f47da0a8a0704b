/*
 * traffic serve ADDRESS:PORT                              answers, and takes streams
 * traffic exchanges ADDRESS:PORT WARM_UP COUNT            requests and answers on one connection
 * traffic connections ADDRESS:PORT WARM_UP COUNT          connections with one request and answer each
 * traffic stream ADDRESS:PORT WARM_UP BYTES WRITE_SIZE    so many bytes on one connection, after so many exchanges
 * traffic unix WARM_UP COUNT                              requests and answers between two processes over AF_UNIX: no network at all
 *
 * Prints how long all of it took and, of exchanges and connections, the quantiles; in ns. Every socket is nonblocking, as acceleration wants it.
 */
#include <poll.h>
#include <sys/epoll.h>
#include <time.h>

#include "net.h"

/* A request is this long, and so is its answer. The first byte says what the server does: answer, answer and close, take a stream and answer its end. */
enum { MESSAGE = 64 };
enum { GO_ON = 'g', CLOSE = 'c', STREAM = 's' };

/* For the agent, which works on the same CPU, to enrol what has warmed up. */
enum { ENROLMENT_MS = 60 };

static void fail(const char *what)
{
	fprintf(stderr, "traffic: %s: %s\n", what, errno_name(errno));
	exit(1);
}

static long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000L + now.tv_nsec;
}

static void until(int fd, short events)
{
	struct pollfd wanted = {.fd = fd, .events = events};

	if (poll(&wanted, 1, 10000) != 1) {
		errno = ETIMEDOUT;
		fail("poll");
	}
}

/* The connection of now. */
static int epoll = -1;

static void watch(int fd)
{
	struct epoll_event event = {.events = EPOLLIN};

	if (epoll < 0)
		epoll = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		fail("epoll_ctl");
}

static void until_readable(void)
{
	struct epoll_event event;

	if (epoll_wait(epoll, &event, 1, 10000) != 1) {
		errno = ETIMEDOUT;
		fail("epoll_wait");
	}
}

static void send_all(int fd, const char *bytes, size_t size)
{
	while (size > 0) {
		ssize_t done = write(fd, bytes, size);

		if (done < 0 && errno != EAGAIN)
			fail("write");
		if (done < 0)
			until(fd, POLLOUT);
		if (done > 0) {
			bytes += done;
			size -= done;
		}
	}
}

static void await_answer(int fd)
{
	char answer[MESSAGE];

	for (size_t held = 0; held < MESSAGE;) {
		ssize_t got;

		until_readable();
		got = read(fd, answer, MESSAGE - held);
		if (got == 0 || (got < 0 && errno != EAGAIN))
			fail("read");
		if (got > 0)
			held += got;
	}
}

static void await_end(int fd)
{
	char byte;

	until(fd, POLLIN);
	if (read(fd, &byte, 1))
		fail("end");
}

static int connect_to(const union address *to)
{
	int fd = socket(to->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1, error = 0;
	socklen_t size = sizeof(error);

	if (fd < 0 || setsockopt(fd, SOL_TCP, TCP_NODELAY, &on, sizeof(on)))
		fail("socket");
	if (connect(fd, &to->any, address_size(to)) && errno != EINPROGRESS)
		fail("connect");
	until(fd, POLLOUT);
	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) || error) {
		errno = error;
		fail("connect");
	}
	watch(fd);
	return fd;
}

static void exchange(int fd, char kind)
{
	char request[MESSAGE] = {kind};

	send_all(fd, request, sizeof(request));
	await_answer(fd);
}

static int warm_connection(const union address *to, int exchanges)
{
	const struct timespec pause = {.tv_nsec = ENROLMENT_MS * 1000000L};
	int fd = connect_to(to);

	if (exchanges == 0)
		return fd;
	for (int i = 0; i < exchanges; i++)
		exchange(fd, GO_ON);
	nanosleep(&pause, NULL);
	for (int i = 0; i < exchanges; i++)
		exchange(fd, GO_ON);
	return fd;
}

static int by_value(const void *a, const void *b)
{
	long left = *(const long *)a, right = *(const long *)b;

	return (left > right) - (left < right);
}

static void print(long taken, long *samples, int count)
{
	qsort(samples, count, sizeof(*samples), by_value);
	printf("{\"taken\":%ld,\"p50\":%ld,\"p99\":%ld}\n", taken, samples[(count - 1) / 2], samples[(count - 1) * 99L / 100]);
}

static void exchanges(int fd, int count)
{
	long *samples = calloc(count, sizeof(*samples)), started = now_ns();

	for (int i = 0; i < count; i++) {
		long begun = now_ns();

		exchange(fd, GO_ON);
		samples[i] = now_ns() - begun;
	}
	print(now_ns() - started, samples, count);
}

static void exchanges_over_unix(int warm_up, int count)
{
	char bytes[MESSAGE];
	int ends[2];
	pid_t child;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends))
		fail("socketpair");
	child = fork();
	if (child < 0)
		fail("fork");
	if (child == 0) {
		close(ends[0]);
		watch(ends[1]);
		for (;;) {
			until_readable();
			if (read(ends[1], bytes, MESSAGE) != MESSAGE)
				_exit(0);
			send_all(ends[1], bytes, MESSAGE);
		}
	}
	close(ends[1]);
	watch(ends[0]);
	for (int i = 0; i < warm_up; i++)
		exchange(ends[0], GO_ON);
	exchanges(ends[0], count);
}

/* The server ends each, so that no port of the client's waits for two minutes. */
static void connect_once(const union address *to)
{
	int fd = connect_to(to);

	exchange(fd, CLOSE);
	await_end(fd);
	close(fd);
}

static void connections(const union address *to, int warm_up, int count)
{
	long *samples = calloc(count, sizeof(*samples)), started;

	for (int i = 0; i < warm_up; i++)
		connect_once(to);
	started = now_ns();
	for (int i = 0; i < count; i++) {
		long begun = now_ns();

		connect_once(to);
		samples[i] = now_ns() - begun;
	}
	print(now_ns() - started, samples, count);
}

static void stream(const union address *to, int warm_up, long bytes, size_t write_size)
{
	char first[MESSAGE] = {STREAM}, *buffer = calloc(1, write_size);
	int fd = warm_connection(to, warm_up);
	long started = now_ns();

	send_all(fd, first, sizeof(first));
	for (long left = bytes; left > 0; left -= write_size)
		send_all(fd, buffer, (size_t)left < write_size ? (size_t)left : write_size);
	shutdown(fd, SHUT_WR);
	await_answer(fd);
	printf("{\"taken\":%ld}\n", now_ns() - started);
}

struct connection {
	int fd;
	char kind;
	size_t held;
};

static void finish(struct connection *connection)
{
	close(connection->fd);
	free(connection);
}

static void serve_one(struct connection *connection)
{
	static char bytes[262144];
	ssize_t got = read(connection->fd, bytes, connection->kind == STREAM ? sizeof(bytes) : MESSAGE - connection->held);

	if (got < 0 && errno == EAGAIN)
		return;
	if (got == 0 && connection->kind == STREAM)
		send_all(connection->fd, bytes, MESSAGE);
	if (got <= 0)
		return finish(connection);
	if (connection->kind == STREAM)
		return;
	if (connection->held == 0)
		connection->kind = bytes[0];
	connection->held += got;
	if (connection->held < MESSAGE)
		return;
	connection->held = 0;
	if (connection->kind != STREAM)
		send_all(connection->fd, bytes, MESSAGE);
	if (connection->kind == CLOSE)
		finish(connection);
}

static void serve(const char *at)
{
	struct connection listener = {.fd = listen_at(at)};
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = &listener};
	int epoll = epoll_create1(EPOLL_CLOEXEC), on = 1;

	epoll_ctl(epoll, EPOLL_CTL_ADD, listener.fd, &event);
	puts("{\"ready\":true}");
	for (;;) {
		struct connection *connection;
		int fd;

		if (epoll_wait(epoll, &event, 1, -1) != 1)
			continue;
		if (event.data.ptr != &listener) {
			serve_one(event.data.ptr);
			continue;
		}
		fd = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (fd < 0)
			continue;
		connection = calloc(1, sizeof(*connection));
		connection->fd = fd;
		setsockopt(fd, SOL_TCP, TCP_NODELAY, &on, sizeof(on));
		event = (struct epoll_event){.events = EPOLLIN, .data.ptr = connection};
		epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	}
}

int main(int argc, char **argv)
{
	union address to;

	prepare_process();
	if (argc < 3)
		misuse("traffic serve|exchanges|connections|stream ADDRESS:PORT …, or traffic unix …");
	if (!strcmp(argv[1], "unix") && argc == 4) {
		exchanges_over_unix(atoi(argv[2]), atoi(argv[3]));
		return 0;
	}
	to = parse_address(argv[2]);
	if (!strcmp(argv[1], "serve"))
		serve(argv[2]);
	else if (!strcmp(argv[1], "exchanges") && argc == 5)
		exchanges(warm_connection(&to, atoi(argv[3])), atoi(argv[4]));
	else if (!strcmp(argv[1], "connections") && argc == 5)
		connections(&to, atoi(argv[3]), atoi(argv[4]));
	else if (!strcmp(argv[1], "stream") && argc == 6)
		stream(&to, atoi(argv[3]), atol(argv[4]), atol(argv[5]));
	else
		misuse(argv[1]);
	return 0;
}
