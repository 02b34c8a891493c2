/* Stands between a program and its kernel (LD_PRELOAD), and refuses what the environment names, as other kernels and
 * network cards do while it runs: they said before that they could.
 *
 * REFUSE_BATCHES=N  any send of several datagrams (UDP_SEGMENT) fails with error N
 * REFUSE_FRAMES=1   any write to the TUN that is longer than a packet fails with EINVAL; by seccomp, since the program
 *                   makes that call itself
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/seccomp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define UDP_LEVEL 17
#define SEGMENT 103
/* Longer than any packet of a TUN with the usual MTU. */
#define LONG 2000

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	const char *code = getenv("REFUSE_BATCHES");
	struct cmsghdr *control = CMSG_FIRSTHDR(message);
	for (; code && control; control = CMSG_NXTHDR((struct msghdr *)message, control))
		if (control->cmsg_level == UDP_LEVEL && control->cmsg_type == SEGMENT) {
			errno = atoi(code);
			return -1;
		}
	return syscall(SYS_sendmsg, fd, message, flags);
}

static int refuse_long_writes(int fd)
{
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF(op, value, yes, no) BPF_JUMP(BPF_JMP | op | BPF_K, value, yes, no)
#define RETURN(value) BPF_STMT(BPF_RET | BPF_K, value)
	struct sock_filter filter[] = {
		LOAD(nr),
		IF(BPF_JEQ, SYS_writev, 1, 0),
		IF(BPF_JEQ, SYS_write, 0, 6),
		LOAD(args[0]),
		IF(BPF_JEQ, fd, 0, 4),
		LOAD(nr),
		/* Only what was joined has several pieces. */
		IF(BPF_JEQ, SYS_writev, 3, 0),
		LOAD(args[2]),
		IF(BPF_JGT, LONG, 1, 0),
		RETURN(SECCOMP_RET_ALLOW),
		RETURN(SECCOMP_RET_ERRNO | EINVAL),
	};
	struct sock_fprog program = { .len = sizeof filter / sizeof *filter, .filter = filter };
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -1;
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list rest;
	va_start(rest, request);
	void *argument = va_arg(rest, void *);
	va_end(rest);
	int result = syscall(SYS_ioctl, fd, request, argument);
	if (result == 0 && request == TUNSETOFFLOAD && getenv("REFUSE_FRAMES") && refuse_long_writes(fd))
		abort();
	return result;
}
