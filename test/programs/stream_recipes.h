/*
 * Two recipes of streams.c, on one connection at a time.
 *
 *   h13 [--rounds N] [--exchanges N] [--settle-ms N] [--burst N] [--hung SECONDS]
 *       KERNEL.md H13: a receive buffer of 16 MiB, 2 MiB sent at once, a reader that sleeps, wakes once and reads 40,000-byte pieces until a short one, and for
 *       the rest waits for the next edge. Each direction in turn.
 *   halfread, with the same options
 *       The same with half a message unread whenever more comes: from before the server has accepted (TCP_DEFER_ACCEPT), while whoever enrols late looks, and when the 2 MiB come.
 *   stopped [--exchanges N] [--settle-ms N] [--rounds N] [--most N]
 *       H2: how much the kernel takes from a non-blocking sender whose reader has stopped, and what it costs; then all of it has to be read.
 *
 * Exchanges and a pause come first, so that whoever enrols late has enrolled.
 */
#ifndef STREAM_RECIPES_H
#define STREAM_RECIPES_H

enum { H13_BUFFER = 16 << 20, H13_PIECE = 40000, STOPPED_WRITE = 4096, STOPPED_QUIET_MS = 500, EXCHANGE = 64, HALF = 32 };

struct pipe_end {
	int fd;
	uint64_t key_out, sent, received;
};

static void fail_recipe(const char *what)
{
	fprintf(stderr, "streams: %s: %s\n", what, errno_name(errno));
	exit(1);
}

static bool wait_for(int fd, int events, int timeout_ms)
{
	struct pollfd one = {.fd = fd, .events = events};

	return poll(&one, 1, timeout_ms) > 0;
}

/* Sends up to `size`, until the kernel takes no more. */
static uint64_t push(struct pipe_end *end, char *buffer, uint64_t size)
{
	uint64_t before = end->sent;
	ssize_t done;

	fill_content(buffer, end->key_out, end->sent, size);
	while (size > 0 && (done = write(end->fd, buffer + (end->sent - before), size)) > 0) {
		end->sent += done;
		size -= done;
	}
	return end->sent - before;
}

/*
 * @param buffer - of both sockets; 0: the kernel's own
 * @param client_first - bytes that the client sends before the server accepts
 */
static void connect_ends(struct pipe_end ends[2], int round, int buffer, size_t client_first)
{
	static int own = -1;
	union address to = options.to[0], any = {0};
	char first[EXCHANGE];
	int listener;

	if (own < 0)
		own = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	to.in.sin_port = any.in.sin_port = htons(options.port + round);
	any.any.sa_family = to.any.sa_family;
	enter(options.server_netns);
	listener = socket(any.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	set_option(listener, SOL_SOCKET, SO_REUSEADDR, 1);
	if (buffer) {
		set_option(listener, SOL_SOCKET, SO_RCVBUFFORCE, buffer);
		set_option(listener, SOL_SOCKET, SO_SNDBUFFORCE, buffer);
	}
	if (client_first)
		set_option(listener, SOL_TCP, TCP_DEFER_ACCEPT, 5);
	if (bind(listener, &any.any, address_size(&any)) || listen(listener, 1))
		fail_recipe("listen");
	enter(own);
	ends[CLIENT].fd = socket(to.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (buffer) {
		set_option(ends[CLIENT].fd, SOL_SOCKET, SO_RCVBUFFORCE, buffer);
		set_option(ends[CLIENT].fd, SOL_SOCKET, SO_SNDBUFFORCE, buffer);
	}
	if (connect(ends[CLIENT].fd, &to.any, address_size(&to)) && errno != EINPROGRESS)
		fail_recipe("connect");
	if (!wait_for(ends[CLIENT].fd, POLLOUT, 5000))
		fail_recipe("connect");
	for (enum side side = CLIENT; side <= SERVER; side++) {
		ends[side].key_out = content_key(options.seed, round, side);
		ends[side].sent = ends[side].received = 0;
	}
	if (push(&ends[CLIENT], first, client_first) < client_first || !wait_for(listener, POLLIN, 5000))
		fail_recipe("accept");
	ends[SERVER].fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	close(listener);
	for (enum side side = CLIENT; side <= SERVER; side++)
		set_option(ends[side].fd, SOL_TCP, TCP_NODELAY, 1);
}

/* One read; the bytes have to be those that come next. @return what it gave; 0: EAGAIN */
static size_t pull(struct pipe_end *end, const struct pipe_end *from, char *buffer, size_t size)
{
	ssize_t got = read(end->fd, buffer, size);
	size_t at;

	if (got < 0 && errno == EAGAIN)
		return 0;
	if (got <= 0)
		fail_recipe("read");
	at = first_wrong(buffer, from->key_out, end->received, got);
	if (at < (size_t)got) {
		int64_t found = find_content(buffer + at, got - at, from->key_out, from->sent);

		printf("{\"failure\":\"%s\",\"at\":%llu,\"found\":%lld}\n", found < 0 ? "corrupt" : "reordered", (unsigned long long)(end->received + at), (long long)found);
		exit(1);
	}
	end->received += got;
	return got;
}

/* All that was sent but for the last `rest` bytes. */
static void pull_up_to(struct pipe_end *end, const struct pipe_end *from, size_t rest)
{
	char buffer[EXCHANGE];

	while (end->received + rest < from->sent) {
		uint64_t left = from->sent - rest - end->received;

		if (!wait_for(end->fd, POLLIN, 5000))
			fail_recipe("no exchange");
		pull(end, from, buffer, left < EXCHANGE ? left : EXCHANGE);
	}
}

/* @param rest - bytes that stay unread at both ends */
static void exchange(struct pipe_end ends[2], size_t rest)
{
	char buffer[EXCHANGE];

	for (int count = 0; count < 2 * options.exchanges; count++) {
		struct pipe_end *from = &ends[count % 2], *to = &ends[!(count % 2)];

		if (count == options.exchanges)
			usleep(options.settle_ms * 1000);
		if (push(from, buffer, EXCHANGE) < EXCHANGE)
			fail_recipe("exchange");
		pull_up_to(to, from, rest);
	}
}

static int run_h13(bool half)
{
	char *out = malloc(options.burst), *in = malloc(H13_PIECE);
	int stuck = 0;

	for (int round = 0; round < options.rounds; round++) {
		struct pipe_end ends[2], *from = &ends[round % 2], *to = &ends[!(round % 2)];
		int epoll = epoll_create1(EPOLL_CLOEXEC), wakes = 0;
		struct epoll_event edge = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET};
		uint64_t target;

		connect_ends(ends, round, H13_BUFFER, half ? EXCHANGE : 0);
		if (half) {
			pull_up_to(&ends[SERVER], &ends[CLIENT], HALF);
			exchange(ends, HALF);
		}
		exchange(ends, 0);
		if (half)
			exchange(ends, HALF);
		epoll_ctl(epoll, EPOLL_CTL_ADD, to->fd, &edge);
		epoll_wait(epoll, &edge, 1, 0);
		target = from->sent + options.burst;
		while (from->sent < target) {
			push(from, out, target - from->sent);
			if (from->sent < target && !wait_for(from->fd, POLLOUT, 200))
				break;
		}
		usleep(100000);
		while (to->received < target && epoll_wait(epoll, &edge, 1, (int)(options.hung_ns / MS)) > 0) {
			wakes++;
			while (pull(to, from, in, H13_PIECE) == H13_PIECE)
				;
			/* Past what was taken at once the sender goes on, as any does. */
			push(from, out, target - from->sent);
		}
		stuck += to->received < target;
		if (to->received < target) {
			int unread = -1;

			ioctl(to->fd, FIONREAD, &unread);
			printf("{\"round\":%d,\"failure\":\"hung\",\"sent\":%llu,\"received\":%llu,\"of\":%llu,\"unread\":%d,\"wakes\":%d}\n", round,
			       (unsigned long long)from->sent, (unsigned long long)to->received, (unsigned long long)target, unread, wakes);
		}
		close(ends[CLIENT].fd);
		close(ends[SERVER].fd);
		close(epoll);
	}
	printf("{\"rounds\":%d,\"stuck\":%d}\n", options.rounds, stuck);
	return stuck > 0;
}

/* Bytes of TCP memory on the whole machine. */
static uint64_t tcp_memory(void)
{
	FILE *file = fopen("/proc/net/sockstat", "r");
	char line[256];
	unsigned long long pages = 0;

	while (file && fgets(line, sizeof(line), file)) {
		char *mem = strstr(line, "mem ");

		if (!strncmp(line, "TCP:", 4) && mem)
			pages = strtoull(mem + 4, NULL, 10);
	}
	if (file)
		fclose(file);
	return pages * sysconf(_SC_PAGESIZE);
}

static uint32_t socket_memory(int fd, int what)
{
	uint32_t values[SK_MEMINFO_VARS] = {0};
	socklen_t size = sizeof(values);

	getsockopt(fd, SOL_SOCKET, SO_MEMINFO, values, &size);
	return values[what];
}

static int run_stopped(void)
{
	char *buffer = malloc(PIECE_MAX);
	int failed = 0;

	for (int round = 0; round < options.rounds; round++) {
		struct pipe_end ends[2], *from = &ends[round % 2], *to = &ends[!(round % 2)];
		uint64_t before, after, accepted;
		uint32_t reader, sender;

		connect_ends(ends, round, 0, 0);
		exchange(ends, 0);
		before = tcp_memory();
		accepted = from->sent;
		while (from->sent - accepted < options.most && (push(from, buffer, STOPPED_WRITE) > 0 || wait_for(from->fd, POLLOUT, STOPPED_QUIET_MS)))
			;
		accepted = from->sent - accepted;
		after = tcp_memory();
		reader = socket_memory(to->fd, SK_MEMINFO_RMEM_ALLOC);
		sender = socket_memory(from->fd, SK_MEMINFO_WMEM_QUEUED);
		while (to->received < from->sent && (pull(to, from, buffer, PIECE_MAX) > 0 || wait_for(to->fd, POLLIN, (int)(options.hung_ns / MS))))
			;
		failed += to->received < from->sent;
		printf("{\"round\":%d,\"accepted\":%llu,\"memory\":%lld,\"reader_memory\":%u,\"sender_memory\":%u,\"received\":%llu,\"all\":%s}\n", round,
		       (unsigned long long)accepted, (long long)(after - before), reader, sender, (unsigned long long)to->received,
		       to->received < from->sent ? "false" : "true");
		close(ends[CLIENT].fd);
		close(ends[SERVER].fd);
	}
	return failed > 0;
}

#endif
