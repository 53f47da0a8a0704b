/* in [--netns PATH] [--cgroup DIR] [--uid N] [--gid N] -- COMMAND…: runs it there, and with nothing outliving the caller. */
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <sys/prctl.h>

#include "net.h"

static void fail(const char *what)
{
	fprintf(stderr, "in: %s: %s\n", what, errno_name(errno));
	exit(1);
}

int main(int argc, char **argv)
{
	const char *netns = NULL, *cgroup = NULL;
	int uid = -1, gid = -1, at = 1;

	for (; at + 1 < argc && strcmp(argv[at], "--"); at += 2) {
		if (!strcmp(argv[at], "--netns"))
			netns = argv[at + 1];
		else if (!strcmp(argv[at], "--cgroup"))
			cgroup = argv[at + 1];
		else if (!strcmp(argv[at], "--uid"))
			uid = atoi(argv[at + 1]);
		else if (!strcmp(argv[at], "--gid"))
			gid = atoi(argv[at + 1]);
		else
			misuse(argv[at]);
	}
	if (at + 1 >= argc)
		misuse("in … -- COMMAND");
	if (cgroup) {
		char path[4096];
		int fd;

		snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
		fd = open(path, O_WRONLY);
		if (fd < 0 || write(fd, "0", 1) != 1)
			fail(path);
		close(fd);
	}
	if (netns) {
		int fd = open(netns, O_RDONLY);

		if (fd < 0 || setns(fd, CLONE_NEWNET))
			fail(netns);
		close(fd);
	}
	/* Where the tests run from may be closed to another user. */
	if (chdir("/"))
		fail("/");
	if (gid >= 0 && (setgroups(0, NULL) || setgid(gid)))
		fail("setgid");
	if (uid >= 0 && setuid(uid))
		fail("setuid");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	execvp(argv[at + 1], argv + at + 1);
	fail(argv[at + 1]);
}
