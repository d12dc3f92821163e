"""A Linux process that shuts itself in, then runs code and a test: no network, no children, one folder to write to.

Run as a script (`python -I -S sandbox.py`) it is the child: it reads its settings from standard input, gives up what it
does not need, and only then compiles what it was given. `execution.py` is the parent, and imports the filter from here.
It imports little, as it starts for every test.

- seccomp (https://docs.kernel.org/userspace-api/seccomp_filter.html): system calls that are not listed below fail, so
  sockets, new processes and programs, signals to others, ptrace, io_uring, mounts, modes, owners and limits are out.
- Landlock (https://docs.kernel.org/userspace-api/landlock.html): files outside Python's own and the system's libraries
  cannot be opened, and only the working folder is written to. Folders cannot be made in it, so it stays easy to remove.
- Resource limits: address space, processor time, size of a file, open files, no core dump. SIGKILL if the parent dies.
"""

import ctypes
import marshal
import os
import struct
import sys

# Calls that are always allowed, name:x86_64:aarch64 (arch/x86/entry/syscalls/syscall_64.tbl, asm-generic/unistd.h).
_ALLOWED = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
sendfile:40:71 close:3:57 lseek:8:62 dup:32:23 dup2:33: dup3:292:24 pipe:22: pipe2:293:59 poll:7: ppoll:271:73
select:23: pselect6:270:72 epoll_create:213: epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:
epoll_pwait:281:22 eventfd:284: eventfd2:290:19 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
sendto:44:206 recvfrom:45:207 getsockname:51:204 getpeername:52:205 getsockopt:55:209
creat:85: stat:4: fstat:5:80 lstat:6: newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44
access:21: faccessat:269:48 readlink:89: readlinkat:267:78 getdents:78: getdents64:217:61 getcwd:79:17 chdir:80:49
fchdir:81:50 ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83 fadvise64:221:223 rename:82:
renameat:264:38 renameat2:316:276 link:86: linkat:265:37 unlink:87: unlinkat:263:35 umask:95:166 mmap:9:222
mprotect:10:226 munmap:11:215 mremap:25:216 madvise:28:233 msync:26:227 mincore:27:232 brk:12:214
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sigaltstack:131:132 restart_syscall:219:128 pause:34: nanosleep:35:101 clock_nanosleep:230:115
getitimer:36:102 setitimer:38:103 alarm:37: gettimeofday:96:169 time:201: times:100:153 clock_gettime:228:113
clock_getres:229:114 getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176
getegid:108:177 getgroups:115:158 getresuid:118:148 getresgid:120:150 getpgid:121:155 getpgrp:111: getsid:124:156
uname:63:160 sysinfo:99:179 getrusage:98:165 getrlimit:97:163 getcpu:309:168 getrandom:318:278 sched_yield:24:124
sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
sched_get_priority_min:147:126 arch_prctl:158: set_tid_address:218:96 set_robust_list:273:99 futex:202:98
rseq:334:293 membarrier:324:283 exit:60:93 exit_group:231:94
"""
# Calls that depend on their arguments: the call; conditions that must all hold, each a 32-bit word of the arguments, a
# mask and the masked values to allow; the error otherwise.
_LOW, _HIGH = 0, 1
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38
_CHECKED: list[tuple[str, list[tuple[int, int, list[int]]], int]] = [
    ("clone:56:220", [(_LOW, 0x10000, [0x10000])], _EPERM),  # threads (CLONE_THREAD), no processes
    ("fcntl:72:25", [(2 + _LOW, ~0, [*range(8), 1030])], _EPERM),  # nothing from F_SETOWN on: it sends signals
    # A file opened for reading, or for nothing, would be truncated: Landlock sees that from Linux 6.2 on.
    ("open:2:", [(2 + _LOW, 0o1003, [0, 1, 2, 3, 0o1001, 0o1002])], _EPERM),
    ("openat:257:56", [(4 + _LOW, 0o1003, [0, 1, 2, 3, 0o1001, 0o1002])], _EPERM),
    ("prlimit64:302:261", [(4 + _LOW, ~0, [0]), (4 + _HIGH, ~0, [0])], _EPERM),  # asks for limits, sets none
    ("socketpair:53:199", [(_LOW, ~0, [1]), (2 + _LOW, 15, [1])], _EPERM),  # AF_UNIX streams, for asyncio
    ("ioctl:16:29", [(2 + _LOW, ~0, [0x5421])], _ENOTTY),  # FIONBIO, for asyncio
]
_FIRST_RECENT = 424  # calls from here on have one number everywhere; all are refused, those still to be invented too
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = tuple(_AUDIT_ARCH)


def filter_program(machine: str) -> bytes:
    """The seccomp filter for a machine of `MACHINES`: an array of struct sock_filter (linux/filter.h)."""
    load, equal, at_least, mask_with, answer = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000  # SECCOMP_RET_ALLOW, _KILL_PROCESS, _ERRNO
    column = 1 + MACHINES.index(machine)
    code = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[machine]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, _FIRST_RECENT), (answer, 0, 0, refuse | _ENOSYS)]  # x32's numbers are above it too
    for call in _ALLOWED.split():
        if number := call.split(":")[column]:
            code += [(equal, 0, 1, int(number)), (answer, 0, 0, allow)]
    for call, conditions, error in _CHECKED:
        if number := call.split(":")[column]:
            body = []
            for word, mask, values in conditions:
                body += [(load, 0, 0, 16 + 4 * word), (mask_with, 0, 0, mask & 0xFFFFFFFF)]
                body += [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
                body.append((answer, 0, 0, refuse | error))
            code += [(equal, 0, len(body) + 1, int(number)), *body, (answer, 0, 0, allow)]
    code.append((answer, 0, 0, refuse | _EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


class _Protection:
    """Calls libc. An error names the protection that the call would have given."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.syscall.restype = ctypes.c_long

    def prctl(self, name: str, option: int, *arguments: object) -> None:
        words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
        self._check(name, self.libc.prctl(option, *words, *[ctypes.c_ulong(0)] * (4 - len(words))))

    def landlock(self, call: int, *arguments: object) -> int:
        words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        return self._check("Landlock (Linux 5.13)", self.libc.syscall(ctypes.c_long(444 + call), *words))

    @staticmethod
    def _check(name: str, result: int) -> int:
        if result < 0:
            raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")
        return result


def _limit(seconds: float, memory_mb: int) -> None:
    import resource

    for what, wanted in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_CPU, int(seconds) + 2),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(what)[1]
        limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(what, (limit, limit))


def _restrict_files(protection: _Protection, readable: list[str]) -> None:
    """Landlock: reading `readable`, reading, writing, making and removing files in the working folder, nothing else."""
    write_file, read_file, read_dir, remove_file, make_reg, truncate = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
    version = protection.landlock(0, None, 0, 1)
    handled = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    attributes = struct.pack("=Q", handled)
    ruleset = protection.landlock(0, attributes, len(attributes), 0)
    read, write = read_file | read_dir, write_file | remove_file | make_reg | truncate
    allowed = [(path, read) for path in readable] + [(".", read | write), ("/dev/null", read | write)]
    for path, access in allowed:
        file = os.open(path, os.O_PATH)
        if not os.path.isdir(path):
            access &= read_file | write_file | truncate
        protection.landlock(1, ruleset, 1, struct.pack("=Qi", access & handled, file), 0)
        os.close(file)
    protection.landlock(2, ruleset, 0)
    os.close(ruleset)


def _shut_in(settings: dict) -> None:
    protection = _Protection()
    protection.prctl("PR_SET_PDEATHSIG", 1, 9)
    if os.getppid() != settings["parent"]:  # it died before that
        os._exit(1)
    _limit(settings["seconds"], settings["memory_mb"])
    protection.prctl("PR_SET_NO_NEW_PRIVS", 38, 1)
    _restrict_files(protection, settings["readable"])
    program = _Program(len(settings["filter"]) // 8, settings["filter"])
    protection.prctl("seccomp filters", 22, 2, ctypes.byref(program))


def _run(code: str, test: str, channel: int, token: bytes) -> None:
    # Names are bound before the tested code can replace them in their modules.
    write, leave, run = os.write, os._exit, exec
    module = sys.modules["answer"] = type(sys)("answer")
    try:
        parts = [compile(text, name, "exec", dont_inherit=True) for text, name in ((code, "answer"), (test, "test"))]
        for part in parts:
            run(part, module.__dict__)
    except BaseException:
        leave(1)
    write(channel, token)
    leave(0)


def _main() -> None:
    settings = marshal.loads(sys.stdin.buffer.read())
    channel, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)
    sys.path += settings["packages"]
    try:
        _shut_in(settings)
    except OSError as e:
        os.write(channel, str(e).encode())
        os._exit(1)
    _run(settings["code"], settings["test"], channel, settings["token"])


if __name__ == "__main__":
    _main()
