/*
 * streams [run] --to ADDRESS… [--server-netns PATH] [--seed N] [--streams N] [--bytes N] [--only FIRST[-LAST]] [--max-bytes N] [--lanes N] [--hung SECONDS]
 *         [--max-failures N] [--port N] [--duplex N]
 * streams h13|halfread|stopped --to ADDRESS [--server-netns PATH] … (stream_recipes.h)
 *
 * Runs random streams between two threads, of which the one that listens may be in another network namespace, and compares every byte. One JSON line for each
 * stream that failed, with what it takes to run it again, and one at the end. At least --streams and --bytes; each lane runs one stream after the other.
 * With --duplex all streams are alike: a client that blocks, with a thread that reads and one that writes, and so many bytes each way at once.
 */
#include <fcntl.h>
#include <linux/sock_diag.h>
#include <linux/sockios.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <time.h>

#include "streams.h"

enum { TO_MAX = 16, LANES_MAX = 512, TURN_EVENTS = 128, SOURCE_PORTS = 6000 };
#define NEVER UINT64_MAX
#define MS 1000000ull
#define SECOND (1000 * MS)

struct options {
	union address to[TO_MAX];
	int to_count, server_netns, port, lanes, max_failures, exchanges, rounds, settle_ms;
	uint64_t seed, streams, bytes, first, last, max_bytes, hung_ns, burst, most, duplex;
};

static struct options options = {
	.server_netns = -1, .port = 20000, .lanes = 64, .max_failures = 10, .streams = 1000, .last = UINT64_MAX, .max_bytes = 4 << 20, .hung_ns = 10 * SECOND,
	.exchanges = 64, .rounds = 10, .settle_ms = 100, .burst = 2 << 20, .most = 1 << 30,
};

enum state { IDLE, READY, LISTENING, CONNECTING, OPEN, THREADED, THREAD_ENDED, CLOSED };

struct end {
	enum side side;
	_Atomic enum state state;
	_Atomic int fd;
	_Atomic uint64_t sent, received;
	_Atomic bool complete;             /* has sent and received all */
	int step, file;
	uint64_t allowed, key_in, key_out;
	uint64_t accept_at, read_pause_at, write_pause_at, read_resume, write_resume;
	uint32_t interest;
	bool readable, writable, hung_up, shut;
	_Atomic bool ended;                /* EOF, or the reset that was planned */
	struct random read_random, write_random;
	pthread_t thread;
};

struct lane {
	uint64_t index, next;
	bool drawn;
	_Atomic bool failed;
	struct plan plan;
	struct end ends[2];
	/* Of ends that have threads. */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	/* Of the watchdog. */
	uint64_t watched_index, watched_progress, progressed_at;
};

static struct lane lanes[LANES_MAX];
static int wakes[2];
static _Atomic int failures, wrong, hung;
static _Atomic uint64_t verified, finished_streams, fionread_checked, fionread_wrong, fast_opened;
static _Atomic bool over;
static pthread_mutex_t report_lock = PTHREAD_MUTEX_INITIALIZER;
enum trait {
	CHATTY, CLIENT_FIRST, SERVER_FIRST, DEFER_ACCEPT, ACCEPT_DELAY, FAST_OPEN, REUSED_TUPLE, HALF_CLOSE, RESETS, MAPPED, BLOCKING, EDGE_TRIGGERED,
	UNTIL_SHORT, SLOW, STOPPING, PEEKS, PARTIAL_READS, VECTORS, SENDFILE, SMALL_BUFFER, LARGE_BUFFER, TRAITS
};
static const char *const trait_names[] = {
	"chatty", "client_first", "server_first", "defer_accept", "accept_delay", "fast_open", "reused_tuple", "half_close", "resets", "mapped", "blocking",
	"edge_triggered", "until_short", "slow", "stopping", "peeks", "partial_reads", "vectors", "sendfile", "small_buffer", "large_buffer"
};
static uint64_t drawn[TRAITS];

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * SECOND + now.tv_nsec;
}

static void wake(enum side side)
{
	uint64_t one = 1;

	if (write(wakes[side], &one, sizeof(one)) < 0)
		perror("eventfd");
}

static struct lane *lane_of(struct end *end)
{
	return (struct lane *)((char *)(end - end->side) - offsetof(struct lane, ends));
}

static const struct end_plan *plan_of(struct end *end)
{
	return &lane_of(end)->plan.ends[end->side];
}

static struct end *other_end(struct end *end)
{
	return &lane_of(end)->ends[!end->side];
}

static uint64_t incoming(struct end *end)
{
	return plan_of(other_end(end))->total;
}

static void print_end(const char *name, struct end *end)
{
	static const char *const states[] = {"idle", "ready", "listening", "connecting", "open", "blocking", "blocking, ended", "closed"};
	static const char *const readers[] = {"level", "edge, drains", "edge, until short"};
	const struct end_plan *plan = plan_of(end);
	int unread = -1, unsent = -1;

	if (end->fd >= 0) {
		ioctl(end->fd, FIONREAD, &unread);
		ioctl(end->fd, SIOCOUTQ, &unsent);
	}
	printf(",\"%s\":{\"sent\":%llu,\"to_send\":%llu,\"allowed\":%llu,\"received\":%llu,\"to_receive\":%llu,\"unread\":%d,\"unsent\":%d,\"eof\":%s,\"state\":\"%s\","
	       "\"reader\":\"%s\",\"read_max\":%u,\"write_max\":%u,\"receive_buffer\":%u,\"send_buffer\":%u,\"sendfile\":%s,\"peeks\":%s}",
	       name, (unsigned long long)end->sent, (unsigned long long)plan->total, (unsigned long long)end->allowed, (unsigned long long)end->received,
	       (unsigned long long)incoming(end), unread, unsent, end->ended ? "true" : "false", states[end->state],
	       plan->blocking ? "blocking" : readers[plan->reader], plan->read_max, plan->write_max, plan->receive_buffer, plan->send_buffer,
	       plan->sendfile ? "true" : "false", plan->peeks ? "true" : "false");
}

/* The first failure of a stream is reported, and ends it. */
__attribute__((format(printf, 3, 4))) static void fail(struct lane *lane, const char *failure, const char *format, ...)
{
	static const char *const endings[] = {"shutdown", "client closes", "server closes", "client resets", "server resets"};
	static const char *const fast_opens[] = {"none", "sendto", "connect"};
	const struct plan *plan = &lane->plan;
	va_list arguments;

	pthread_mutex_lock(&report_lock);
	if (!lane->failed) {
		lane->failed = true;
		failures++;
		*(strcmp(failure, "hung") ? &wrong : &hung) += 1;
		printf("{\"stream\":%llu,\"failure\":\"%s\",\"detail\":\"", (unsigned long long)lane->index, failure);
		va_start(arguments, format);
		vprintf(format, arguments);
		va_end(arguments);
		printf("\",\"reproduce\":\"--seed %llu --only %llu --lanes %d --max-bytes %llu\",\"ending\":\"%s\",\"fast_open\":\"%s\",\"server_first\":%s,\"chatty\":%s,"
		       "\"defer_accept\":%s,\"fixed_source\":%s,\"half_close\":%s,\"accept_delay_ms\":%u",
		       (unsigned long long)options.seed, (unsigned long long)lane->index, options.lanes, (unsigned long long)options.max_bytes,
		       endings[plan->ending], fast_opens[plan->fast_open], plan->server_first ? "true" : "false", plan->chatty ? "true" : "false",
		       plan->defer_accept ? "true" : "false", plan->fixed_source ? "true" : "false", plan->half_close ? "true" : "false", plan->accept_delay_ms);
		print_end("client", &lane->ends[CLIENT]);
		print_end("server", &lane->ends[SERVER]);
		puts("}");
	}
	pthread_mutex_unlock(&report_lock);
	wake(CLIENT);
	wake(SERVER);
}

/* Compares what was read, or peeked at, with what has to come next. */
static void verify(struct end *end, const char *bytes, size_t size, const char *how)
{
	static const char *const directions[] = {"server to client", "client to server"};
	struct lane *lane = lane_of(end);
	uint64_t offset = end->received, total = incoming(end);
	size_t at;
	int64_t from;

	if (offset + size > total)
		return fail(lane, "surplus", "%s: %zu bytes %s at %llu, where there are %llu", directions[end->side], size, how, (unsigned long long)offset, (unsigned long long)total);
	at = first_wrong(bytes, end->key_in, offset, size);
	if (at == size)
		return;
	from = find_content(bytes + at, size - at, end->key_in, total);
	if (from < 0)
		fail(lane, size - at < 8 ? "unplaced" : "corrupt", "%s: wrong at %llu, %zu bytes %s", directions[end->side], (unsigned long long)(offset + at), size, how);
	else
		fail(lane, from > (int64_t)(offset + at) ? "reordered" : "duplicated", "%s: at %llu are the bytes of %lld, %zu bytes %s", directions[end->side],
		     (unsigned long long)(offset + at), (long long)from, size, how);
}

/* The other end may wait for this before it resets. */
static void note_complete(struct end *end)
{
	if (end->complete || end->sent < plan_of(end)->total || end->received < incoming(end))
		return;
	end->complete = true;
	wake(!end->side);
}

static size_t piece(struct random *random, uint32_t most, bool fixed)
{
	return fixed ? most : draw_between(random, 1, most);
}

/* A reset is planned, and this end has all that it needs. */
static bool may_be_reset(struct end *end)
{
	return lane_of(end)->plan.ending == (end->side == CLIENT ? END_SERVER_RESETS : END_CLIENT_RESETS) && end->complete;
}

/* The whole of `size` is asked for in one call. @return as read(2) does; -1 with EAGAIN, or after a failure, which is reported. */
static ssize_t receive(struct end *end, char *buffer, size_t size)
{
	const struct end_plan *plan = plan_of(end);
	struct lane *lane = lane_of(end);
	struct iovec parts[2] = {{buffer, size / 2}, {buffer + size / 2, size - size / 2}};
	int promised = -1;
	ssize_t got, peeked = 0;

	if (plan->peeks && chance(&end->read_random, 30)) {
		peeked = recv(end->fd, buffer, size, MSG_PEEK);
		if (peeked > 0) {
			verify(end, buffer, peeked, "peeked at");
			memset(buffer, 0x5a, peeked);
			ioctl(end->fd, FIONREAD, &promised);
			fionread_checked++;
			fionread_wrong += promised < peeked;
		}
	} else if (chance(&end->read_random, 10)) {
		ioctl(end->fd, FIONREAD, &promised);
	}
	got = plan->vectors ? readv(end->fd, parts, 2) : read(end->fd, buffer, size);
	if (got < 0 && errno == EAGAIN) {
		if (plan->blocking)
			fail(lane, "again", "a blocking read gave EAGAIN at %llu", (unsigned long long)end->received);
		else if (peeked > 0)
			fail(lane, "lost", "%zd bytes were peeked at, and then none could be read", peeked);
		errno = EAGAIN;
		return -1;
	}
	if (got < 0 && errno == EINTR && lane->failed)
		return -1;
	if (got < 0 && errno == ECONNRESET && may_be_reset(end))
		got = 0;
	if (got < 0) {
		fail(lane, "error", "%s: read gave %s", end->side == CLIENT ? "client" : "server", errno_name(errno));
		return -1;
	}
	if (promised > 0 && !peeked) {
		fionread_checked++;
		fionread_wrong += got < promised && (size_t)got < size;
	}
	if (got == 0) {
		end->ended = true;
		if (end->received < incoming(end))
			fail(lane, "lost", "%s: ended at %llu of %llu", end->side == CLIENT ? "server to client" : "client to server", (unsigned long long)end->received,
			     (unsigned long long)incoming(end));
		return 0;
	}
	verify(end, buffer, got, "read");
	end->received += got;
	verified += got;
	return got;
}

static uint64_t allowed(struct end *end)
{
	const struct end_plan *plan = plan_of(end);

	while (end->step < plan->step_count && end->received >= plan->steps[end->step].received) {
		if (lane_of(end)->plan.half_close && end->side == SERVER && end->step == plan->step_count - 1 && !end->ended)
			break;
		end->allowed = plan->steps[end->step++].send_until;
	}
	return end->allowed;
}

/* @return as write(2) does; -1 with EAGAIN, or after a failure, which is reported. */
static ssize_t send_piece(struct end *end, char *buffer, size_t size, bool more_follow)
{
	const struct end_plan *plan = plan_of(end);
	struct lane *lane = lane_of(end);
	int flags = plan->more && more_follow && chance(&end->write_random, 30) ? MSG_MORE : 0;
	off_t offset = end->sent;
	ssize_t done;

	if (!plan->sendfile)
		fill_content(buffer, end->key_out, end->sent, size);
	if (plan->sendfile) {
		done = sendfile(end->fd, end->file, &offset, size);
	} else if (plan->vectors || flags) {
		struct iovec parts[3] = {{buffer, size / 3}, {buffer + size / 3, size / 3}, {buffer + 2 * (size / 3), size - 2 * (size / 3)}};
		struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};

		done = sendmsg(end->fd, &message, flags);
	} else {
		done = write(end->fd, buffer, size);
	}
	if (done >= 0) {
		end->sent += done;
		return done;
	}
	/* A Fast Open that had no cookie. */
	if (errno == EINPROGRESS)
		errno = EAGAIN;
	if (errno == EAGAIN && plan->blocking)
		fail(lane, "again", "a blocking write gave EAGAIN at %llu", (unsigned long long)end->sent);
	else if (errno != EAGAIN && !(errno == EINTR && lane->failed))
		fail(lane, "error", "%s: write gave %s", end->side == CLIENT ? "client" : "server", errno_name(errno));
	return -1;
}

static void close_end(struct end *end, bool reset)
{
	struct linger linger = {1, 0};
	struct tcp_info info = {0};
	socklen_t size = sizeof(info);
	int fd = end->fd;

	if (end->side == CLIENT) {
		getsockopt(fd, SOL_TCP, TCP_INFO, &info, &size);
		fast_opened += (info.tcpi_options & TCPI_OPT_SYN_DATA) != 0;
	}
	if (reset)
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	end->fd = -1;
	close(fd);
	if (end->file >= 0)
		close(end->file);
	end->file = -1;
}

/* Ends what is to end. @return whether the socket is closed */
static bool settle(struct end *end)
{
	struct lane *lane = lane_of(end);
	enum ending ending = lane->plan.ending;
	bool all_sent = end->sent == plan_of(end)->total;

	if (lane->failed) {
		close_end(end, true);
		return true;
	}
	note_complete(end);
	if (ending == (end->side == CLIENT ? END_CLIENT_RESETS : END_SERVER_RESETS)) {
		if (!end->complete || !other_end(end)->complete)
			return false;
		close_end(end, true);
		return true;
	}
	if (ending == END_SHUTDOWN && all_sent && !end->shut) {
		shutdown(end->fd, SHUT_WR);
		end->shut = true;
	}
	if (ending == (end->side == CLIENT ? END_CLIENT_CLOSES : END_SERVER_CLOSES) ? !end->complete : !end->ended || !all_sent)
		return false;
	close_end(end, false);
	return true;
}

static bool pauses(uint64_t done, uint64_t every, uint64_t *pause_at)
{
	if (!every || done < *pause_at)
		return false;
	*pause_at = done + every;
	return true;
}

static union address destination_of(const struct lane *lane)
{
	union address to = options.to[lane->plan.destination];

	to.in.sin_port = htons(options.port + (lane - lanes));
	return lane->plan.mapped && to.any.sa_family == AF_INET ? mapped(to) : to;
}

/* --- Blocking ends: one thread reads, one writes. */

static void *write_blocking(void *argument)
{
	struct end *end = argument;
	struct lane *lane = lane_of(end);
	const struct end_plan *plan = plan_of(end);
	char *buffer = malloc(PIECE_MAX);

	while (end->sent < plan->total && !lane->failed) {
		uint64_t left;
		size_t size;

		pthread_mutex_lock(&lane->lock);
		while ((left = allowed(end) - end->sent) == 0 && !lane->failed)
			pthread_cond_wait(&lane->changed, &lane->lock);
		pthread_mutex_unlock(&lane->lock);
		size = piece(&end->write_random, plan->write_max, plan->fixed_sizes);
		if (lane->failed || send_piece(end, buffer, size < left ? size : left, size < left) < 0)
			break;
		note_complete(end);
		if (pauses(end->sent, plan->write_pause_every, &end->write_pause_at))
			usleep(plan->write_pause_ms * 1000);
	}
	if (!lane->failed && lane->plan.ending == END_SHUTDOWN) {
		shutdown(end->fd, SHUT_WR);
		end->shut = true;
	}
	free(buffer);
	return NULL;
}

/* Whether there is something to read for that is still to come. */
static bool reads_on(struct end *end)
{
	enum ending ending = lane_of(end)->plan.ending;
	bool ends_it = end->side == CLIENT ? ending == END_CLIENT_CLOSES || ending == END_CLIENT_RESETS : ending == END_SERVER_CLOSES || ending == END_SERVER_RESETS;

	return !end->ended && (!ends_it || end->received < incoming(end));
}

static void *run_blocking(void *argument)
{
	struct end *end = argument;
	struct lane *lane = lane_of(end);
	const struct end_plan *plan = plan_of(end);
	char *buffer = malloc(PIECE_MAX);
	pthread_t writer;

	if (end->side == CLIENT) {
		union address to = destination_of(lane);

		if (connect(end->fd, &to.any, address_size(&to)))
			fail(lane, "error", "connect gave %s", errno_name(errno));
	}
	pthread_create(&writer, NULL, write_blocking, end);
	while (reads_on(end) && !lane->failed) {
		ssize_t got = receive(end, buffer, piece(&end->read_random, plan->read_max, plan->fixed_sizes));

		pthread_mutex_lock(&lane->lock);
		pthread_cond_broadcast(&lane->changed);
		pthread_mutex_unlock(&lane->lock);
		note_complete(end);
		if (got < 0)
			break;
		if (pauses(end->received, plan->read_pause_every, &end->read_pause_at))
			usleep(plan->read_pause_ms * 1000);
	}
	pthread_join(writer, NULL);
	while (!settle(end))
		usleep(1000);
	end->state = THREAD_ENDED;
	wake(end->side);
	free(buffer);
	return NULL;
}

/* --- Non-blocking ends. */

static void watch(struct end *end, int epoll, int operation, uint32_t interest)
{
	struct epoll_event event = {.events = interest, .data.ptr = end};

	if (epoll_ctl(epoll, operation, end->fd, &event))
		fail(lane_of(end), "error", "epoll_ctl gave %s", errno_name(errno));
	end->interest = interest;
}

static void set_option(int fd, int level, int name, int value)
{
	if (setsockopt(fd, level, name, &value, sizeof(value))) {
		fprintf(stderr, "setsockopt(%d, %d): %s\n", level, name, errno_name(errno));
		exit(1);
	}
}

static void prepare_socket(int fd, const struct end_plan *plan)
{
	set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	if (plan->receive_buffer)
		set_option(fd, SOL_SOCKET, SO_RCVBUFFORCE, plan->receive_buffer);
	if (plan->send_buffer)
		set_option(fd, SOL_SOCKET, SO_SNDBUFFORCE, plan->send_buffer);
	if (plan->no_delay)
		set_option(fd, SOL_TCP, TCP_NODELAY, 1);
}

static void start_open(struct end *end, int epoll)
{
	struct lane *lane = lane_of(end);
	const struct end_plan *plan = plan_of(end);

	if (plan->blocking) {
		end->state = THREADED;
		pthread_create(&end->thread, NULL, run_blocking, end);
		return;
	}
	end->state = end->state == READY && !(lane->plan.fast_open == FAST_OPEN_CONNECT) ? CONNECTING : OPEN;
	watch(end, epoll, EPOLL_CTL_ADD, plan->reader == READ_LEVEL ? EPOLLIN | EPOLLOUT : EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
}

/* The server's end comes first: the client connects when it listens. */
static void start_stream(struct lane *lane, int epoll)
{
	const struct plan *plan = &lane->plan;
	union address to = options.to[plan->destination], any = {0};
	struct end *server = &lane->ends[SERVER];

	any.any.sa_family = to.any.sa_family == AF_INET6 || plan->dual_stack ? AF_INET6 : AF_INET;
	any.in.sin_port = htons(options.port + (lane - lanes));
	server->fd = socket(any.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	prepare_socket(server->fd, &plan->ends[SERVER]);
	if (any.any.sa_family == AF_INET6)
		set_option(server->fd, SOL_IPV6, IPV6_V6ONLY, to.any.sa_family == AF_INET6);
	if (plan->defer_accept)
		set_option(server->fd, SOL_TCP, TCP_DEFER_ACCEPT, 5);
	if (plan->fast_open) {
		set_option(server->fd, SOL_TCP, TCP_FASTOPEN, 16);
		set_option(server->fd, SOL_TCP, TCP_FASTOPEN_NO_COOKIE, 1);
	}
	if (bind(server->fd, &any.any, address_size(&any)) || listen(server->fd, 16)) {
		perror("listen");
		exit(1);
	}
	server->state = LISTENING;
	watch(server, epoll, EPOLL_CTL_ADD, EPOLLIN);
	lane->ends[CLIENT].state = READY;
	wake(CLIENT);
}

static void accept_stream(struct end *end, int epoll)
{
	int listener = end->fd, fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | (plan_of(end)->blocking ? 0 : SOCK_NONBLOCK));

	if (fd < 0) {
		if (errno != EAGAIN)
			fail(lane_of(end), "error", "accept gave %s", errno_name(errno));
		end->accept_at = 0;
		watch(end, epoll, EPOLL_CTL_MOD, EPOLLIN);
		return;
	}
	end->fd = fd;
	close(listener);
	start_open(end, epoll);
}

static void connect_stream(struct end *end, int epoll)
{
	struct lane *lane = lane_of(end);
	const struct plan *plan = &lane->plan;
	union address to = destination_of(lane), from = {0};
	char buffer[1024];
	int result;

	end->fd = socket(to.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | (plan->ends[CLIENT].blocking ? 0 : SOCK_NONBLOCK), 0);
	prepare_socket(end->fd, &plan->ends[CLIENT]);
	if (plan->fixed_source) {
		from.any.sa_family = to.any.sa_family;
		from.in.sin_port = htons(options.port + SOURCE_PORTS + (lane - lanes));
		if (bind(end->fd, &from.any, address_size(&from)))
			fail(lane, "error", "bind gave %s", errno_name(errno));
	}
	if (plan->ends[CLIENT].blocking)
		return start_open(end, epoll);
	if (plan->fast_open)
		set_option(end->fd, SOL_TCP, TCP_FASTOPEN_NO_COOKIE, 1);
	if (plan->fast_open == FAST_OPEN_CONNECT)
		set_option(end->fd, SOL_TCP, TCP_FASTOPEN_CONNECT, 1);
	if (plan->fast_open == FAST_OPEN_SENDTO) {
		uint64_t size = allowed(end);

		size = size < sizeof(buffer) ? size : sizeof(buffer);
		fill_content(buffer, end->key_out, 0, size);
		result = sendto(end->fd, buffer, size, MSG_FASTOPEN, &to.any, address_size(&to));
		end->sent += result > 0 ? result : 0;
	} else {
		result = connect(end->fd, &to.any, address_size(&to));
	}
	if (result < 0 && errno != EINPROGRESS)
		fail(lane, "error", "connect gave %s", errno_name(errno));
	start_open(end, epoll);
}

/* An edge, or a level, that the kernel reported. */
static void note_events(struct end *end, uint32_t events)
{
	int error = 0;
	socklen_t size = sizeof(error);

	if (end->state == CONNECTING && (events & (EPOLLOUT | EPOLLERR))) {
		getsockopt(end->fd, SOL_SOCKET, SO_ERROR, &error, &size);
		if (error)
			return fail(lane_of(end), "error", "connect gave %s", errno_name(error));
		end->state = OPEN;
	}
	end->hung_up |= (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
	end->readable |= end->hung_up || (events & EPOLLIN);
	end->writable |= (events & EPOLLOUT) != 0;
}

/* @return when it has to be called again without an event: 0 at once */
static uint64_t turn_open(struct end *end, int epoll, uint64_t now, char *buffer)
{
	const struct end_plan *plan = plan_of(end);
	uint64_t again = NEVER, left;
	bool reads, writes;

	if (end->readable && !end->ended && now >= end->read_resume) {
		size_t size = piece(&end->read_random, plan->read_max, plan->fixed_sizes);
		ssize_t got = receive(end, buffer, size);

		if (plan->reader == READ_LEVEL || got < 0 || (plan->reader == READ_UNTIL_SHORT && (size_t)got < size && !end->hung_up))
			end->readable = false;
		if (pauses(end->received, plan->read_pause_every, &end->read_pause_at))
			end->read_resume = now + plan->read_pause_ms * MS;
	}
	left = allowed(end) - end->sent;
	if (end->writable && left > 0 && now >= end->write_resume) {
		size_t size = piece(&end->write_random, plan->write_max, plan->fixed_sizes);
		ssize_t done;

		size = size < left ? size : left;
		done = send_piece(end, buffer, size, size < left);
		/* sendfile(2) may be short for its own reasons. */
		if (plan->reader == READ_LEVEL || done < 0 || (plan->reader == READ_UNTIL_SHORT && (size_t)done < size && !plan->sendfile))
			end->writable = false;
		if (pauses(end->sent, plan->write_pause_every, &end->write_pause_at))
			end->write_resume = now + plan->write_pause_ms * MS;
	}
	if (settle(end)) {
		end->state = CLOSED;
		wake(SERVER);
		return NEVER;
	}
	reads = !end->ended;
	writes = allowed(end) > end->sent;
	if (reads && (end->read_resume > now || (plan->reader != READ_LEVEL && end->readable)))
		again = end->read_resume > now ? end->read_resume : 0;
	if (writes && (end->write_resume > now || (plan->reader != READ_LEVEL && end->writable)) && again > 0)
		again = end->write_resume <= now ? 0 : end->write_resume < again ? end->write_resume : again;
	if (plan->reader == READ_LEVEL) {
		uint32_t interest = (reads && end->read_resume <= now ? EPOLLIN : 0) | (writes && end->write_resume <= now ? EPOLLOUT : 0);

		if (interest != end->interest)
			watch(end, epoll, EPOLL_CTL_MOD, interest);
	}
	return again;
}

static void count_drawn(const struct plan *plan)
{
	drawn[CHATTY] += plan->chatty;
	drawn[CLIENT_FIRST] += !plan->server_first;
	drawn[SERVER_FIRST] += plan->server_first;
	drawn[DEFER_ACCEPT] += plan->defer_accept;
	drawn[ACCEPT_DELAY] += plan->accept_delay_ms > 0;
	drawn[FAST_OPEN] += plan->fast_open != FAST_OPEN_NONE;
	drawn[REUSED_TUPLE] += plan->fixed_source;
	drawn[HALF_CLOSE] += plan->half_close;
	drawn[RESETS] += plan->ending == END_CLIENT_RESETS || plan->ending == END_SERVER_RESETS;
	drawn[MAPPED] += plan->mapped;
	for (enum side side = CLIENT; side <= SERVER; side++) {
		const struct end_plan *end = &plan->ends[side];

		drawn[BLOCKING] += end->blocking;
		drawn[EDGE_TRIGGERED] += !end->blocking && end->reader != READ_LEVEL;
		drawn[UNTIL_SHORT] += !end->blocking && end->reader == READ_UNTIL_SHORT;
		drawn[SLOW] += end->read_pause_every > 0 && end->read_pause_ms < STOP_MS;
		drawn[STOPPING] += end->read_pause_every > 0 && end->read_pause_ms >= STOP_MS;
		drawn[PEEKS] += end->peeks;
		drawn[PARTIAL_READS] += end->read_max < plan->ends[!side].write_max;
		drawn[VECTORS] += end->vectors;
		drawn[SENDFILE] += end->sendfile;
		drawn[SMALL_BUFFER] += end->receive_buffer > 0 && end->receive_buffer <= 65536;
		drawn[LARGE_BUFFER] += end->receive_buffer > 65536;
	}
}

/* The memory file is not written again while the kernel may still send from it. */
static int content_file(uint64_t key, uint64_t total)
{
	char buffer[65536];
	int file = memfd_create("content", MFD_CLOEXEC);

	for (uint64_t offset = 0; offset < total; offset += sizeof(buffer)) {
		size_t size = total - offset < sizeof(buffer) ? total - offset : sizeof(buffer);

		fill_content(buffer, key, offset, size);
		if (pwrite(file, buffer, size, offset) < 0)
			perror("memfd");
	}
	return file;
}

/* @return false when the lane has run its last */
static bool draw_stream(struct lane *lane)
{
	uint64_t index = lane->next;

	lane->next += options.lanes;
	if (index > options.last || (index >= options.streams && verified >= options.bytes) || failures >= options.max_failures)
		return false;
	lane->index = index;
	draw_plan(&lane->plan, options.seed, index, options.max_bytes, options.to_count, index % options.lanes < (unsigned int)options.lanes / 4);
	if (options.duplex)
		plan_duplex(&lane->plan, options.duplex);
	count_drawn(&lane->plan);
	for (enum side side = CLIENT; side <= SERVER; side++) {
		struct end *end = &lane->ends[side];
		const struct end_plan *plan = &lane->plan.ends[side];

		memset(end, 0, sizeof(*end));
		end->side = side;
		end->fd = end->file = -1;
		end->key_out = content_key(options.seed, index, side);
		end->key_in = content_key(options.seed, index, !side);
		end->read_pause_at = plan->read_pause_every;
		end->write_pause_at = plan->write_pause_every;
		end->read_random.state = mix(end->key_out);
		end->write_random.state = mix(end->key_in + 1);
		if (plan->sendfile)
			end->file = content_file(end->key_out, plan->total);
	}
	lane->failed = false;
	return true;
}

static uint64_t turn(struct lane *lane, enum side side, int epoll, uint64_t now, char *buffer)
{
	struct end *end = &lane->ends[side];

	switch (end->state) {
	case READY:
		connect_stream(end, epoll);
		return 0;
	case LISTENING:
		if (end->readable && !end->accept_at) {
			end->accept_at = now + lane->plan.accept_delay_ms * MS;
			/* Level-triggered, and not to be heard of meanwhile. */
			watch(end, epoll, EPOLL_CTL_MOD, 0);
		}
		if (lane->failed) {
			close_end(end, true);
			end->state = CLOSED;
			return 0;
		}
		if (!end->accept_at || now < end->accept_at)
			return end->accept_at ? end->accept_at : NEVER;
		end->readable = false;
		accept_stream(end, epoll);
		return 0;
	case CONNECTING:
		if (lane->failed) {
			close_end(end, true);
			end->state = CLOSED;
			wake(SERVER);
		}
		return NEVER;
	case OPEN:
		return turn_open(end, epoll, now, buffer);
	case THREADED:
		if (lane->failed) {
			pthread_mutex_lock(&lane->lock);
			pthread_cond_broadcast(&lane->changed);
			pthread_mutex_unlock(&lane->lock);
			pthread_kill(end->thread, SIGUSR1);
			return now + 20 * MS;
		}
		return NEVER;
	case THREAD_ENDED:
		pthread_join(end->thread, NULL);
		end->state = CLOSED;
		wake(SERVER);
		return 0;
	case CLOSED:
		if (side == SERVER && lane->ends[CLIENT].state == CLOSED) {
			finished_streams++;
			end->state = IDLE;
			lane->drawn = false;
		}
		return NEVER;
	case IDLE:
		break;
	}
	return NEVER;
}

static void enter(int netns)
{
	if (netns >= 0 && setns(netns, CLONE_NEWNET)) {
		perror("setns");
		exit(1);
	}
}

static void *run_side(void *argument)
{
	enum side side = *(enum side *)argument;
	int epoll = epoll_create1(EPOLL_CLOEXEC), running = options.lanes;
	struct epoll_event events[TURN_EVENTS], woken = {.events = EPOLLIN};
	char *buffer = malloc(PIECE_MAX);
	uint64_t again = 0;

	if (side == SERVER)
		enter(options.server_netns);
	epoll_ctl(epoll, EPOLL_CTL_ADD, wakes[side], &woken);
	while (side == SERVER ? running > 0 : !over) {
		uint64_t now = now_ns(), count;
		int got = epoll_wait(epoll, events, TURN_EVENTS, again == NEVER ? -1 : again <= now ? 0 : (int)((again - now) / MS) + 1);

		for (int i = 0; i < got; i++) {
			if (events[i].data.ptr)
				note_events(events[i].data.ptr, events[i].events);
			else if (read(wakes[side], &count, sizeof(count)) < 0)
				perror("eventfd");
		}
		now = now_ns();
		again = NEVER;
		for (int i = 0; i < options.lanes; i++) {
			uint64_t lane_again;

			if (side == SERVER && !lanes[i].drawn && lanes[i].next != NEVER) {
				lanes[i].drawn = draw_stream(&lanes[i]);
				if (lanes[i].drawn) {
					start_stream(&lanes[i], epoll);
				} else {
					lanes[i].next = NEVER;
					running--;
				}
			}
			lane_again = turn(&lanes[i], side, epoll, now, buffer);
			again = lane_again < again ? lane_again : again;
			if (side == SERVER && !lanes[i].drawn && lanes[i].next != NEVER)
				again = 0;
		}
	}
	over = true;
	wake(!side);
	free(buffer);
	return NULL;
}

/* Streams that stand still. */
static void watch_lanes(void)
{
	uint64_t now = now_ns();

	for (int i = 0; i < options.lanes; i++) {
		struct lane *lane = &lanes[i];
		const struct end *client = &lane->ends[CLIENT], *server = &lane->ends[SERVER];
		uint64_t progress = client->sent + client->received + server->sent + server->received + client->state + server->state;

		if (lane->index != lane->watched_index || progress != lane->watched_progress || server->state == IDLE || lane->failed) {
			lane->watched_index = lane->index;
			lane->watched_progress = progress;
			lane->progressed_at = now;
		} else if (now - lane->progressed_at > options.hung_ns) {
			fail(lane, "hung", "no progress for %llu s", (unsigned long long)(options.hung_ns / SECOND));
		}
	}
}

static void on_signal(int number)
{
	(void)number;
}

static int run_streams(void)
{
	enum side sides[] = {CLIENT, SERVER};
	struct sigaction interrupt = {.sa_handler = on_signal};
	pthread_t threads[2];
	uint64_t started = now_ns();

	sigaction(SIGUSR1, &interrupt, NULL);
	for (int i = 0; i < options.lanes; i++) {
		pthread_mutex_init(&lanes[i].lock, NULL);
		pthread_cond_init(&lanes[i].changed, NULL);
		lanes[i].next = i;
		while (lanes[i].next < options.first)
			lanes[i].next += options.lanes;
	}
	for (int i = 0; i < 2; i++)
		wakes[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, run_side, &sides[i]);
	while (!over) {
		usleep(50000);
		watch_lanes();
	}
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	printf("{\"seed\":%llu,\"streams\":%llu,\"wrong\":%d,\"hung\":%d,\"bytes\":%llu,\"seconds\":%.2f,\"fionread\":{\"checked\":%llu,\"wrong\":%llu},\"fast_opened\":%llu,\"drawn\":{",
	       (unsigned long long)options.seed, (unsigned long long)finished_streams, wrong, hung, (unsigned long long)verified, (now_ns() - started) / 1e9,
	       (unsigned long long)fionread_checked, (unsigned long long)fionread_wrong, (unsigned long long)fast_opened);
	for (enum trait trait = 0; trait < TRAITS; trait++)
		printf("%s\"%s\":%llu", trait ? "," : "", trait_names[trait], (unsigned long long)drawn[trait]);
	puts("}}");
	return failures > 0;
}

#include "stream_recipes.h"

static uint64_t parse_number(const char *text)
{
	char *rest;
	uint64_t number = strtoull(text, &rest, 0);

	switch (*rest) {
	case 'K':
		return number << 10;
	case 'M':
		return number << 20;
	case 'G':
		return number << 30;
	case '-':
	case 0:
		return number;
	}
	misuse(text);
	return 0;
}

int main(int argc, char **argv)
{
	const char *mode = "run";
	int at = 1;

	prepare_process();
	options.seed = time(NULL);
	if (at < argc && argv[at][0] != '-')
		mode = argv[at++];
	for (; at + 1 < argc; at += 2) {
		const char *name = argv[at], *value = argv[at + 1];

		if (!strcmp(name, "--to") && options.to_count < TO_MAX) {
			char text[TEXT_MAX];

			snprintf(text, sizeof(text), strchr(value, ':') ? "[%s]:0" : "%s:0", value);
			options.to[options.to_count++] = parse_address(text);
		} else if (!strcmp(name, "--server-netns")) {
			options.server_netns = open(value, O_RDONLY | O_CLOEXEC);
			if (options.server_netns < 0)
				misuse(value);
		} else if (!strcmp(name, "--only")) {
			options.first = options.last = parse_number(value);
			if (strchr(value, '-'))
				options.last = parse_number(strchr(value, '-') + 1);
			options.streams = options.last + 1;
		} else if (!strcmp(name, "--seed")) {
			options.seed = parse_number(value);
		} else if (!strcmp(name, "--streams")) {
			options.streams = parse_number(value);
		} else if (!strcmp(name, "--bytes")) {
			options.bytes = parse_number(value);
		} else if (!strcmp(name, "--max-bytes")) {
			options.max_bytes = parse_number(value);
		} else if (!strcmp(name, "--lanes")) {
			options.lanes = parse_number(value);
		} else if (!strcmp(name, "--hung")) {
			options.hung_ns = parse_number(value) * SECOND;
		} else if (!strcmp(name, "--max-failures")) {
			options.max_failures = parse_number(value);
		} else if (!strcmp(name, "--port")) {
			options.port = parse_number(value);
		} else if (!strcmp(name, "--exchanges")) {
			options.exchanges = parse_number(value);
		} else if (!strcmp(name, "--rounds")) {
			options.rounds = parse_number(value);
		} else if (!strcmp(name, "--settle-ms")) {
			options.settle_ms = parse_number(value);
		} else if (!strcmp(name, "--burst")) {
			options.burst = parse_number(value);
		} else if (!strcmp(name, "--duplex")) {
			options.duplex = parse_number(value);
		} else if (!strcmp(name, "--most")) {
			options.most = parse_number(value);
		} else {
			misuse(name);
		}
	}
	if (at < argc || options.to_count == 0 || options.lanes < 1 || options.lanes > LANES_MAX)
		misuse(at < argc ? argv[at] : "--to, --lanes");
	if (!strcmp(mode, "run"))
		return run_streams();
	if (!strcmp(mode, "h13") || !strcmp(mode, "halfread"))
		return run_h13(!strcmp(mode, "halfread"));
	if (!strcmp(mode, "stopped"))
		return run_stopped();
	misuse(mode);
}
