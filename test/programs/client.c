/*
 * client --to ADDRESS:PORT… [--family 4|6|mapped] [--bind ADDRESS:PORT [--step N]] [--reuseport] [--device IF] [--mark N] [--nonblock] [--tfo sendto|connect] [--mptcp]
 *        [--send TEXT] [--timeout MS] [--count N --parallel P [--pause MS]] [--hold]
 * Connects, reads the server's hello, expects an echo, and says what it saw. SIGTERM ends
 * --count early; --pause is after each failure. With --step each connection's port is N further than the one's before.
 */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "net.h"

#define TO_MAX 64
#define LINE_MAX_BYTES 4096

static struct {
	const char *to[TO_MAX], *family, *bind, *device, *tfo, *send;
	int to_count, mark, timeout, count, parallel, step, pause;
	bool nonblock, mptcp, hold, reuseport;
} options = {.send = "ping", .timeout = 3000, .parallel = 1, .count = -1, .mark = -1};

struct result {
	const char *to;
	const char *outcome, *stage;
	char local[TEXT_MAX], peer[TEXT_MAX], dst4[TEXT_MAX], dst6[TEXT_MAX], hello[LINE_MAX_BYTES];
	bool echo;
	long connect_us;
	int fd;
};

static long now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000L + now.tv_nsec / 1000;
}

static void set_timeout(int fd)
{
	struct timeval wait = {options.timeout / 1000, options.timeout % 1000 * 1000};

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait));
}

static const char *outcome_of_errno(void)
{
	return errno == EAGAIN || errno == EINPROGRESS ? "TIMEOUT" : errno_name(errno);
}

/* NULL when the line is there, without its newline. */
static const char *read_line(int fd, char *line)
{
	for (size_t at = 0; at < LINE_MAX_BYTES - 1; at++) {
		ssize_t got = read(fd, line + at, 1);

		if (got == 0 || (got < 0 && errno != EINTR)) {
			line[0] = 0;
			return got == 0 ? "EOF" : outcome_of_errno();
		}
		if (line[at] == '\n') {
			line[at] = 0;
			return NULL;
		}
	}
	return "EMSGSIZE";
}

static const char *write_all(int fd, const char *data, size_t size)
{
	while (size > 0) {
		ssize_t done = write(fd, data, size);

		if (done < 0)
			return outcome_of_errno();
		data += done;
		size -= done;
	}
	return NULL;
}

static const char *connect_with_poll(int fd, const union address *to)
{
	struct pollfd watched = {fd, POLLOUT, 0};
	int error = 0;
	socklen_t size = sizeof(error);
	const char *failure = NULL;

	fcntl(fd, F_SETFL, O_NONBLOCK);
	if (connect(fd, &to->any, address_size(to))) {
		if (errno != EINPROGRESS)
			failure = errno_name(errno);
		else if (poll(&watched, 1, options.timeout) != 1)
			failure = "TIMEOUT";
		else if (!getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) && error)
			failure = errno_name(error);
	}
	fcntl(fd, F_SETFL, 0);
	return failure;
}

static union address destination(const char *text)
{
	union address to = parse_address(text);

	return options.family && !strcmp(options.family, "mapped") ? mapped(to) : to;
}

static union address next_source(void)
{
	static atomic_int made;
	union address source = parse_address(options.bind);
	in_port_t *port = source.any.sa_family == AF_INET ? &source.in.sin_port : &source.in6.sin6_port;

	*port = htons(ntohs(*port) + options.step * made++);
	return source;
}

static const char *open_connection(struct result *result, const union address *to, const char *message)
{
	int fd = socket(to->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, options.mptcp ? 262 : 0), on = 1;
	const char *failure = NULL;
	long started;

	result->fd = fd;
	result->stage = "bind";
	if (fd < 0)
		return errno_name(errno);
	set_timeout(fd);
	if (options.mark >= 0 && setsockopt(fd, SOL_SOCKET, SO_MARK, &options.mark, sizeof(options.mark)))
		return errno_name(errno);
	if (options.device && setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, options.device, strlen(options.device)))
		return errno_name(errno);
	if (options.bind) {
		union address source = next_source();

		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		if (options.reuseport)
			setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
		if (bind(fd, &source.any, address_size(&source)))
			return errno_name(errno);
	}

	result->stage = "connect";
	started = now_us();
	if (options.tfo && !strcmp(options.tfo, "sendto")) {
		if (sendto(fd, message, strlen(message), MSG_FASTOPEN, &to->any, address_size(to)) < 0)
			failure = outcome_of_errno();
	} else {
		if (options.tfo)
			setsockopt(fd, SOL_TCP, TCP_FASTOPEN_CONNECT, &on, sizeof(on));
		if (options.nonblock)
			failure = connect_with_poll(fd, to);
		else if (connect(fd, &to->any, address_size(to)))
			failure = outcome_of_errno();
		if (!failure && options.tfo)
			failure = write_all(fd, message, strlen(message));
	}
	result->connect_us = now_us() - started;
	return failure;
}

static const char *talk(struct result *result, const char *message)
{
	char echoed[LINE_MAX_BYTES];
	const char *failure;
	int fd = result->fd;

	result->stage = "hello";
	failure = read_line(fd, result->hello);
	if (failure)
		return failure;
	result->stage = "echo";
	if (!options.tfo)
		failure = write_all(fd, message, strlen(message));
	if (!failure)
		failure = read_line(fd, echoed);
	if (failure)
		return failure;
	result->echo = !strncmp(echoed, message, strlen(message) - 1);
	result->stage = "done";
	return NULL;
}

static void connect_once(const char *text, struct result *result)
{
	union address to = destination(text);
	char message[LINE_MAX_BYTES];
	const char *failure;

	memset(result, 0, sizeof(*result));
	result->to = text;
	snprintf(message, sizeof(message), "%s\n", options.send);
	failure = open_connection(result, &to, message);
	if (result->fd >= 0) {
		name_of(result->fd, getsockname, result->local);
		name_of(result->fd, getpeername, result->peer);
		original_dst_of(result->fd, SOL_IP, result->dst4);
		original_dst_of(result->fd, SOL_IPV6, result->dst6);
	}
	if (!failure)
		failure = talk(result, message);
	/* With TCP_FASTOPEN_CONNECT and no data yet the peer is not known before. */
	if (!failure)
		name_of(result->fd, getpeername, result->peer);
	result->outcome = failure ? failure : "ok";
}

static void print_result(const struct result *result)
{
	printf("{\"to\":\"%s\",\"outcome\":\"%s\",\"stage\":\"%s\",\"local\":\"%s\",\"peer\":\"%s\",\"original_dst\":{\"ip\":\"%s\",\"ipv6\":\"%s\"},"
	       "\"hello\":%s,\"echo\":%s,\"connect_us\":%ld}\n",
	       result->to, result->outcome, result->stage, result->local, result->peer, result->dst4, result->dst6,
	       result->hello[0] ? result->hello : "null", result->echo ? "true" : "false", result->connect_us);
}

static void close_result(struct result *result)
{
	if (result->fd >= 0)
		close(result->fd);
}

static atomic_int next, succeeded, failed, wrong_peer;
static atomic_bool stopped;
static pthread_mutex_t errors_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
	const char *name;
	int count;
} errors[64];

static void count_error(const char *name)
{
	pthread_mutex_lock(&errors_lock);
	for (int i = 0; i < 64; i++) {
		if (!errors[i].name)
			errors[i].name = name;
		if (!strcmp(errors[i].name, name)) {
			errors[i].count++;
			break;
		}
	}
	pthread_mutex_unlock(&errors_lock);
}

static void *work(void *unused)
{
	struct result *result = malloc(sizeof(*result));
	int index;

	(void)unused;
	while (!stopped && (index = atomic_fetch_add(&next, 1)) < options.count) {
		const char *to = options.to[index % options.to_count];
		char expected[TEXT_MAX], hello[TEXT_MAX + 16];
		union address address = destination(to);

		connect_once(to, result);
		snprintf(hello, sizeof(hello), "{\"server\":\"%s\"", to);
		if (!strcmp(result->outcome, "ok") && result->echo) {
			succeeded++;
			if (strcmp(result->peer, format_address(&address, expected)) || strncmp(result->hello, hello, strlen(hello)))
				wrong_peer++;
		} else {
			failed++;
			count_error(result->outcome);
			print_result(result);
			usleep(options.pause * 1000);
		}
		close_result(result);
	}
	free(result);
	return NULL;
}

static void stop(int signal)
{
	(void)signal;
	stopped = true;
}

static void run_many(void)
{
	pthread_t *threads = calloc(options.parallel, sizeof(*threads));
	struct sigaction action = {.sa_handler = stop, .sa_flags = SA_RESTART};
	const char *comma = "";

	sigaction(SIGTERM, &action, NULL);
	for (int i = 0; i < options.parallel; i++)
		pthread_create(&threads[i], NULL, work, NULL);
	for (int i = 0; i < options.parallel; i++)
		pthread_join(threads[i], NULL);
	printf("{\"ok\":%d,\"failed\":%d,\"wrong_peer\":%d,\"errors\":{", succeeded, failed, wrong_peer);
	for (int i = 0; i < 64 && errors[i].name; i++, comma = ",")
		printf("%s\"%s\":%d", comma, errors[i].name, errors[i].count);
	puts("}}");
}

/* Each line on stdin goes over every connection and has to come back. */
static void hold(struct result *results, int count)
{
	char line[LINE_MAX_BYTES], echoed[LINE_MAX_BYTES];

	for (int round = 1; fgets(line, sizeof(line), stdin); round++) {
		int ok = 0;

		for (int i = 0; i < count; i++) {
			if (strcmp(results[i].outcome, "ok") || write_all(results[i].fd, line, strlen(line)) || read_line(results[i].fd, echoed))
				continue;
			ok += !strncmp(echoed, line, strlen(line) - 1);
		}
		printf("{\"round\":%d,\"ok\":%d,\"failed\":%d}\n", round, ok, count - ok);
	}
}

int main(int argc, char **argv)
{
	struct result *results;
	int count;

	prepare_process();
	for (int i = 1; i < argc; i++) {
		const char *name = argv[i];

		if (!strcmp(name, "--nonblock"))
			options.nonblock = true;
		else if (!strcmp(name, "--mptcp"))
			options.mptcp = true;
		else if (!strcmp(name, "--hold"))
			options.hold = true;
		else if (!strcmp(name, "--reuseport"))
			options.reuseport = true;
		else if (++i == argc)
			misuse(name);
		else if (!strcmp(name, "--to") && options.to_count < TO_MAX)
			options.to[options.to_count++] = argv[i];
		else if (!strcmp(name, "--family"))
			options.family = argv[i];
		else if (!strcmp(name, "--bind"))
			options.bind = argv[i];
		else if (!strcmp(name, "--step"))
			options.step = atoi(argv[i]);
		else if (!strcmp(name, "--device"))
			options.device = argv[i];
		else if (!strcmp(name, "--mark"))
			options.mark = strtol(argv[i], NULL, 0);
		else if (!strcmp(name, "--tfo"))
			options.tfo = argv[i];
		else if (!strcmp(name, "--send"))
			options.send = argv[i];
		else if (!strcmp(name, "--timeout"))
			options.timeout = atoi(argv[i]);
		else if (!strcmp(name, "--count"))
			options.count = atoi(argv[i]);
		else if (!strcmp(name, "--parallel"))
			options.parallel = atoi(argv[i]);
		else if (!strcmp(name, "--pause"))
			options.pause = atoi(argv[i]);
		else
			misuse(name);
	}
	if (options.to_count == 0)
		misuse("--to ADDRESS:PORT");
	if (options.count >= 0 && !options.hold) {
		run_many();
		return 0;
	}
	count = options.count > 0 ? options.count : options.to_count;
	results = calloc(count, sizeof(*results));
	for (int i = 0; i < count; i++) {
		connect_once(options.to[i % options.to_count], &results[i]);
		print_result(&results[i]);
	}
	if (options.hold)
		hold(results, count);
	for (int i = 0; i < count; i++)
		close_result(&results[i]);
	return 0;
}
