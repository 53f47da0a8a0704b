/* spawn COUNT INPUT-FILE COMMAND…: runs it that often, one after another; prints the median, the least and the 99th percentile of µs from start to end. */
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static double now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

static int by_size(const void *a, const void *b)
{
	double left = *(const double *)a, right = *(const double *)b;

	return (left > right) - (left < right);
}

int main(int argc, char **argv)
{
	int count = argc > 3 ? atoi(argv[1]) : 0;
	double *took = calloc(count > 0 ? count : 1, sizeof(*took));
	posix_spawn_file_actions_t actions;

	if (count <= 0 || !took) {
		fprintf(stderr, "usage: spawn COUNT INPUT-FILE COMMAND…\n");
		return 2;
	}
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 0, argv[2], O_RDONLY, 0);
	posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
	for (int i = 0; i < count; i++) {
		double start = now_us();
		int status = 0;
		pid_t pid;

		if (posix_spawn(&pid, argv[3], &actions, NULL, argv + 3, environ) || waitpid(pid, &status, 0) != pid || status != 0) {
			fprintf(stderr, "spawn: %s failed (status %#x)\n", argv[3], status);
			return 1;
		}
		took[i] = now_us() - start;
	}
	qsort(took, count, sizeof(*took), by_size);
	printf("{\"runs\":%d,\"median_us\":%.0f,\"least_us\":%.0f,\"p99_us\":%.0f}\n", count, took[count / 2], took[0], took[count * 99 / 100]);
	return 0;
}
