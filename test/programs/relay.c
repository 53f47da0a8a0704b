/*
 * relay OUTBOUND INBOUND: a sidecar that costs as little as possible. Listens at both ADDRESS:PORTs, and relays what it accepts to its original destination:
 * from 127.0.0.6 if it came in.
 */
#include <stddef.h>
#include <sys/epoll.h>

#include "net.h"

/* One end of a relayed connection. */
struct side {
	int fd;
	uint32_t events;
	bool connecting, read_ended, write_ended;
	size_t start, held;
	struct side *other;
	char buffer[65536];
};

static int epoll;

static void watch(struct side *side)
{
	struct epoll_event event = {.data.ptr = side};

	if (side->connecting || side->other->held > 0)
		event.events |= EPOLLOUT;
	if (!side->connecting && !side->other->connecting && !side->read_ended && side->held == 0)
		event.events |= EPOLLIN;
	if (event.events == side->events)
		return;
	side->events = event.events;
	epoll_ctl(epoll, EPOLL_CTL_MOD, side->fd, &event);
}

static void end(struct side *side)
{
	close(side->fd);
	close(side->other->fd);
	free(side->other);
	free(side);
}

/* Writes what `from` has read to its other side; false when the connection broke. */
static bool flush(struct side *from)
{
	struct side *to = from->other;

	while (from->held > 0) {
		ssize_t done = write(to->fd, from->buffer + from->start, from->held);

		if (done < 0)
			return errno == EAGAIN;
		from->start += done;
		from->held -= done;
	}
	if (from->read_ended && !to->write_ended) {
		shutdown(to->fd, SHUT_WR);
		to->write_ended = true;
	}
	return true;
}

static void turn(struct side *side, uint32_t events)
{
	int error = 0;
	socklen_t size = sizeof(error);

	if (side->connecting) {
		getsockopt(side->fd, SOL_SOCKET, SO_ERROR, &error, &size);
		if (error)
			return end(side);
		side->connecting = false;
	} else if (!side->read_ended && side->held == 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
		ssize_t got = read(side->fd, side->buffer, sizeof(side->buffer));

		if (got < 0 && errno != EAGAIN)
			return end(side);
		side->read_ended = got == 0;
		side->start = 0;
		side->held = got > 0 ? got : 0;
	}
	if (!flush(side) || !flush(side->other) || (side->write_ended && side->other->write_ended))
		return end(side);
	watch(side);
	watch(side->other);
}

static struct side *side_of(int fd, uint32_t events)
{
	struct side *side = malloc(sizeof(*side));
	struct epoll_event event = {.data.ptr = side, .events = events};
	int on = 1;

	memset(side, 0, offsetof(struct side, buffer));
	side->fd = fd;
	side->events = events;
	setsockopt(fd, SOL_TCP, TCP_NODELAY, &on, sizeof(on));
	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	return side;
}

static void relay(int client, bool inbound)
{
	union address destination = {0}, passthrough = parse_address("127.0.0.6:0");
	socklen_t size = sizeof(destination.in);
	int upstream = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
	struct side *a, *b;

	if (upstream < 0 || getsockopt(client, SOL_IP, SO_ORIGINAL_DST, &destination, &size) ||
	    (inbound && (setsockopt(upstream, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on)) || bind(upstream, &passthrough.any, address_size(&passthrough)))) ||
	    (connect(upstream, &destination.any, size) && errno != EINPROGRESS)) {
		fprintf(stderr, "relay: %s\n", errno_name(errno));
		close(upstream);
		close(client);
		return;
	}
	a = side_of(client, 0);
	b = side_of(upstream, EPOLLOUT);
	b->connecting = true;
	a->other = b;
	b->other = a;
}

int main(int argc, char **argv)
{
	int listeners[2];

	prepare_process();
	if (argc != 3)
		misuse("relay OUTBOUND INBOUND");
	epoll = epoll_create1(EPOLL_CLOEXEC);
	for (int i = 0; i < 2; i++) {
		struct epoll_event event = {.events = EPOLLIN, .data.ptr = &listeners[i]};

		listeners[i] = listen_at(argv[1 + i]);
		epoll_ctl(epoll, EPOLL_CTL_ADD, listeners[i], &event);
	}
	puts("{\"ready\":true}");
	for (;;) {
		/* One at a time: the end of a connection frees what a second event would name. */
		struct epoll_event event;
		int *listener, fd;

		if (epoll_wait(epoll, &event, 1, -1) != 1)
			continue;
		listener = event.data.ptr;
		if (listener != &listeners[0] && listener != &listeners[1])
			turn(event.data.ptr, event.events);
		else if ((fd = accept4(*listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
			relay(fd, listener == &listeners[1]);
	}
}
