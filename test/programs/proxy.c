/*
 * proxy --listen ADDRESS:PORT… [--mark N] [--no-relay] [--brief]: a transparent proxy. Says of every connection who it is from and what every way of
 * asking for the original destination gives, and relays it there.
 */
#include <stddef.h>
#include <sys/epoll.h>

#include "net.h"

/* One direction of a relayed connection. */
struct half {
	int fd;
	bool connecting, read_ended, write_ended;
	size_t held;
	struct half *other;
	char buffer[65536];
};

static int epoll, mark = -1;
static bool relays = true, brief;
/* Halves that ended in this turn; freed after it, as later events of the turn may name them. */
static struct half *ended[64];
static int ended_count;

static void print_answer(int fd, const char *name, int level, socklen_t length, bool last)
{
	unsigned char bytes[256];
	socklen_t returned = length;

	memset(bytes, 0xaa, sizeof(bytes));
	printf("{\"level\":\"%s\",\"length\":%u,", name, length);
	if (getsockopt(fd, level, SO_ORIGINAL_DST, bytes, &returned)) {
		printf("\"result\":\"%s\"}", errno_name(errno));
	} else {
		printf("\"result\":\"ok\",\"returned\":%u,\"bytes\":\"", returned);
		for (socklen_t i = 0; i < length; i++)
			printf("%02x", bytes[i]);
		printf("\"}");
	}
	if (!last)
		putchar(',');
}

static bool original_dst(int fd, union address *address)
{
	socklen_t size = sizeof(address->in);

	if (!getsockopt(fd, SOL_IP, SO_ORIGINAL_DST, address, &size))
		return true;
	size = sizeof(address->in6);
	return !getsockopt(fd, SOL_IPV6, SO_ORIGINAL_DST, address, &size);
}

static void report(int fd, const union address *destination)
{
	static const socklen_t lengths[] = {8, 15, 16, 20, 27, 28, 32, 64, 128};
	const int count = sizeof(lengths) / sizeof(*lengths);
	char peer[TEXT_MAX], local[TEXT_MAX], to[TEXT_MAX];

	printf("{\"peer\":\"%s\",\"local\":\"%s\",\"original_dst\":", name_of(fd, getpeername, peer), name_of(fd, getsockname, local));
	if (destination)
		printf("\"%s\"", format_address(destination, to));
	else
		printf("null");
	if (!brief) {
		printf(",\"answers\":[");
		for (int i = 0; i < count; i++)
			print_answer(fd, "ip", SOL_IP, lengths[i], false);
		for (int i = 0; i < count; i++)
			print_answer(fd, "ipv6", SOL_IPV6, lengths[i], i == count - 1);
		putchar(']');
	}
	puts("}");
}

static void watch(struct half *half, int op)
{
	struct epoll_event event = {.data.ptr = half};

	if (half->connecting || half->other->held > 0)
		event.events |= EPOLLOUT;
	if (!half->connecting && !half->read_ended && half->held == 0)
		event.events |= EPOLLIN;
	epoll_ctl(epoll, op, half->fd, &event);
}

static void end(struct half *half)
{
	if (half->fd < 0)
		return;
	close(half->fd);
	close(half->other->fd);
	half->fd = half->other->fd = -1;
	ended[ended_count++] = half;
	ended[ended_count++] = half->other;
}

/* Moves what `from` has read into the other side; false when the connection broke. */
static bool flush(struct half *from)
{
	struct half *to = from->other;

	while (from->held > 0 && !to->connecting) {
		ssize_t done = write(to->fd, from->buffer, from->held);

		if (done < 0)
			return errno == EAGAIN;
		memmove(from->buffer, from->buffer + done, from->held - done);
		from->held -= done;
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
		half->connecting = false;
	}
	if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && !half->read_ended && half->held == 0) {
		ssize_t got = read(half->fd, half->buffer, sizeof(half->buffer));

		if (got < 0 && errno != EAGAIN)
			return end(half);
		if (got == 0)
			half->read_ended = true;
		if (got > 0)
			half->held = got;
	}
	if (!flush(half) || !flush(half->other))
		return end(half);
	if (half->read_ended && half->other->read_ended && half->held == 0 && half->other->held == 0)
		return end(half);
	watch(half, EPOLL_CTL_MOD);
	watch(half->other, EPOLL_CTL_MOD);
}

static struct half *half_of(int fd)
{
	struct half *half = malloc(sizeof(*half));

	memset(half, 0, offsetof(struct half, buffer));
	half->fd = fd;
	return half;
}

static void relay(int client, const union address *destination)
{
	int upstream = socket(destination->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	struct half *a, *b;

	if (upstream < 0 || (mark >= 0 && setsockopt(upstream, SOL_SOCKET, SO_MARK, &mark, sizeof(mark))) ||
	    (connect(upstream, &destination->any, address_size(destination)) && errno != EINPROGRESS)) {
		close(upstream);
		close(client);
		return;
	}
	a = half_of(client);
	b = half_of(upstream);
	a->other = b;
	b->other = a;
	b->connecting = true;
	watch(a, EPOLL_CTL_ADD);
	watch(b, EPOLL_CTL_ADD);
}

static void accept_all(int listener)
{
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		union address destination = {0};
		bool known = original_dst(fd, &destination);

		report(fd, known ? &destination : NULL);
		if (known && relays)
			relay(fd, &destination);
		else
			close(fd);
	}
}

int main(int argc, char **argv)
{
	struct half *listeners = calloc(argc, sizeof(*listeners));
	int count = 0;

	prepare_process();
	epoll = epoll_create1(EPOLL_CLOEXEC);
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--no-relay")) {
			relays = false;
		} else if (!strcmp(argv[i], "--brief")) {
			brief = true;
		} else if (!strcmp(argv[i], "--mark") && i + 1 < argc) {
			mark = strtol(argv[++i], NULL, 0);
		} else if (!strcmp(argv[i], "--listen") && i + 1 < argc) {
			struct epoll_event event = {.events = EPOLLIN, .data.ptr = &listeners[count]};

			listeners[count].fd = listen_at(argv[++i]);
			epoll_ctl(epoll, EPOLL_CTL_ADD, listeners[count++].fd, &event);
		} else {
			misuse(argv[i]);
		}
	}
	puts("{\"ready\":true}");
	for (;;) {
		struct epoll_event events[16];
		int got = epoll_wait(epoll, events, 16, -1);

		for (int i = 0; i < got; i++) {
			struct half *half = events[i].data.ptr;

			if (half >= listeners && half < listeners + count)
				accept_all(half->fd);
			else
				turn(half, events[i].events);
		}
		while (ended_count > 0)
			free(ended[--ended_count]);
	}
}
