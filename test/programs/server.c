/* server ADDRESS:PORT…: tells each client which address it reached and who it is, then echoes. */
#include <sys/epoll.h>

#include "net.h"

struct connection {
	int fd;
	size_t held;
	bool ended;
	char buffer[65536];
};

static int epoll;

static void drop(struct connection *connection)
{
	close(connection->fd);
	free(connection);
}

/* Reads only what it could write, so that a slow reader is not buffered for. */
static void serve(struct connection *connection)
{
	for (;;) {
		struct epoll_event event = {.data.ptr = connection};
		ssize_t done;

		while (connection->held > 0) {
			done = write(connection->fd, connection->buffer, connection->held);
			if (done < 0 && errno == EAGAIN) {
				event.events = EPOLLOUT;
				epoll_ctl(epoll, EPOLL_CTL_MOD, connection->fd, &event);
				return;
			}
			if (done < 0)
				return drop(connection);
			memmove(connection->buffer, connection->buffer + done, connection->held - done);
			connection->held -= done;
		}
		if (connection->ended)
			return drop(connection);
		done = read(connection->fd, connection->buffer, sizeof(connection->buffer));
		if (done < 0 && errno == EAGAIN) {
			event.events = EPOLLIN;
			epoll_ctl(epoll, EPOLL_CTL_MOD, connection->fd, &event);
			return;
		}
		if (done < 0)
			return drop(connection);
		connection->ended = done == 0;
		connection->held = done;
	}
}

static void accept_all(int listener)
{
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		struct connection *connection = malloc(sizeof(*connection));
		struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
		char local[TEXT_MAX], peer[TEXT_MAX];

		connection->fd = fd;
		connection->ended = false;
		connection->held = snprintf(connection->buffer, sizeof(connection->buffer), "{\"server\":\"%s\",\"peer\":\"%s\"}\n",
					    name_of(fd, getsockname, local), name_of(fd, getpeername, peer));
		epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
		serve(connection);
	}
}

int main(int argc, char **argv)
{
	struct connection *listeners = calloc(argc, sizeof(*listeners));

	prepare_process();
	epoll = epoll_create1(EPOLL_CLOEXEC);
	for (int i = 1; i < argc; i++) {
		struct epoll_event event = {.events = EPOLLIN, .data.ptr = &listeners[i]};

		listeners[i].fd = listen_at(argv[i]);
		epoll_ctl(epoll, EPOLL_CTL_ADD, listeners[i].fd, &event);
	}
	puts("{\"ready\":true}");
	for (;;) {
		struct epoll_event event;

		if (epoll_wait(epoll, &event, 1, -1) != 1)
			continue;
		struct connection *connection = event.data.ptr;

		if (connection > listeners && connection < listeners + argc)
			accept_all(connection->fd);
		else
			serve(connection);
	}
}
