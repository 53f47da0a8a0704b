/*
 * dns --to ADDRESS:PORT… [--tcp] [--unconnected] [--together] [--family mapped] [--bind ADDRESS:PORT] [--mark N] [--timeout MS]
 * Asks each resolver over one UDP socket: connected anew to each, or unconnected by sendto and recvfrom; by TCP over a connection each. With --together
 * all are asked before any answer is read (unconnected only). Says of each where the answer seems to come from, and what it says.
 */
#include "dns.h"

#define TO_MAX 16

static struct {
	const char *to[TO_MAX], *family, *bind;
	int to_count, mark, timeout;
	bool tcp, unconnected, together;
} options = {.mark = -1, .timeout = 1500};

struct result {
	const char *outcome;
	char answer_from[TEXT_MAX], peer[TEXT_MAX], local[TEXT_MAX], answer[256];
};

static union address destination(const char *text)
{
	union address to = parse_address(text);

	return options.family && !strcmp(options.family, "mapped") ? mapped(to) : to;
}

static const char *outcome_of_errno(void)
{
	return errno == EAGAIN || errno == EINPROGRESS ? "TIMEOUT" : errno_name(errno);
}

static int open_socket(int family)
{
	struct timeval wait = {options.timeout / 1000, options.timeout % 1000 * 1000};
	int fd = socket(family, (options.tcp ? SOCK_STREAM : SOCK_DGRAM) | SOCK_CLOEXEC, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait));
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (options.mark >= 0 && setsockopt(fd, SOL_SOCKET, SO_MARK, &options.mark, sizeof(options.mark)))
		misuse("--mark");
	if (options.bind) {
		union address source = parse_address(options.bind);

		if (bind(fd, &source.any, address_size(&source)))
			misuse("--bind");
	}
	return fd;
}

static const char *ask(int fd, int index)
{
	union address to = destination(options.to[index]);
	uint8_t query[2 + DNS_MAX];
	size_t size = dns_query(query + 2, index + 1);
	ssize_t sent;

	put16(query, size);
	if (!options.unconnected && connect(fd, &to.any, address_size(&to)))
		return outcome_of_errno();
	if (options.tcp)
		sent = send(fd, query, 2 + size, 0);
	else if (options.unconnected)
		sent = sendto(fd, query + 2, size, 0, &to.any, address_size(&to));
	else
		sent = send(fd, query + 2, size, 0);
	return sent < 0 ? outcome_of_errno() : NULL;
}

/* Fills the result that the answer belongs to, by its id. */
static const char *receive(int fd, struct result *results)
{
	uint8_t answer[2 + DNS_MAX];
	union address from = {0};
	socklen_t from_size = sizeof(from);
	ssize_t size = recvfrom(fd, answer, sizeof(answer), 0, &from.any, &from_size);
	const uint8_t *message = options.tcp ? answer + 2 : answer;
	struct result *result;

	if (size <= 0)
		return size == 0 ? "EOF" : outcome_of_errno();
	size -= message - answer;
	if (size < DNS_HEADER || get16(message) < 1 || get16(message) > options.to_count)
		return "EBADMSG";
	result = &results[get16(message) - 1];
	if (!dns_text(message, size, result->answer))
		return "EBADMSG";
	if (from_size > 0 && from.any.sa_family)
		format_address(&from, result->answer_from);
	result->outcome = "ok";
	return NULL;
}

static void note_names(int fd, struct result *result)
{
	name_of(fd, getsockname, result->local);
	name_of(fd, getpeername, result->peer);
}

static void ask_each(struct result *results, int fd)
{
	for (int i = 0; i < options.to_count; i++) {
		const char *failure;

		if (options.tcp)
			fd = open_socket(destination(options.to[i]).any.sa_family);
		failure = ask(fd, i);
		note_names(fd, &results[i]);
		if (!failure)
			failure = receive(fd, results);
		if (failure)
			results[i].outcome = failure;
		if (options.tcp)
			close(fd);
	}
}

static void ask_together(struct result *results, int fd)
{
	for (int i = 0; i < options.to_count; i++) {
		results[i].outcome = ask(fd, i);
		note_names(fd, &results[i]);
	}
	for (int i = 0; i < options.to_count; i++) {
		const char *failure = receive(fd, results);

		for (int j = 0; failure && j < options.to_count; j++) {
			if (!results[j].outcome)
				results[j].outcome = failure;
		}
	}
}

int main(int argc, char **argv)
{
	struct result results[TO_MAX] = {0};
	int fd = -1;

	prepare_process();
	for (int i = 1; i < argc; i++) {
		const char *name = argv[i];

		if (!strcmp(name, "--tcp"))
			options.tcp = true;
		else if (!strcmp(name, "--unconnected"))
			options.unconnected = true;
		else if (!strcmp(name, "--together"))
			options.together = options.unconnected = true;
		else if (++i == argc)
			misuse(name);
		else if (!strcmp(name, "--to") && options.to_count < TO_MAX)
			options.to[options.to_count++] = argv[i];
		else if (!strcmp(name, "--family"))
			options.family = argv[i];
		else if (!strcmp(name, "--bind"))
			options.bind = argv[i];
		else if (!strcmp(name, "--mark"))
			options.mark = strtol(argv[i], NULL, 0);
		else if (!strcmp(name, "--timeout"))
			options.timeout = atoi(argv[i]);
		else
			misuse(name);
	}
	if (options.to_count == 0)
		misuse("--to ADDRESS:PORT");
	if (!options.tcp)
		fd = open_socket(destination(options.to[0]).any.sa_family);
	if (options.together)
		ask_together(results, fd);
	else
		ask_each(results, fd);
	for (int i = 0; i < options.to_count; i++)
		printf("{\"to\":\"%s\",\"outcome\":\"%s\",\"answer_from\":\"%s\",\"peer\":\"%s\",\"local\":\"%s\",\"answer\":%s}\n", options.to[i],
		       results[i].outcome, results[i].answer_from, results[i].peer, results[i].local, results[i].answer[0] ? results[i].answer : "null");
	return 0;
}
