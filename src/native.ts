/**
The one typed declaration of the addon (native/*.cc). Nothing else imports the .node file.

Conventions, for everything below:
- Keys, values and socket addresses are raw bytes, laid out as the kernel lays them out; codecs live in `src/maps`.
- Ids and cookies that are 64 bits wide in the kernel are `bigint`.
- Every failure of the kernel throws an `Error` that also is a {@link NativeError}. Wrong argument types or sizes throw `TypeError`
  or `RangeError` before any system call.
- `close()` is idempotent, and safe from JS, from the garbage collector and at the end of the environment (process exit, worker
  termination), in any order. Any other method of a closed object throws a `NativeError` with code `EBADF`.
*/
import {createRequire} from 'node:module';
import {existsSync} from 'node:fs';
import {fileURLToPath} from 'node:url';

/** What the addon adds to an `Error`: facts only; remedies are worded in `src/errors.ts`. */
export interface NativeError extends Error {
	/** Positive errno as the kernel gave it, e.g. 1. */
	readonly errno: number;
	/** Its name, e.g. `EPERM`; 524 is `ENOTSUPP`. */
	readonly code: string;
	/** The system call, or the libbpf function, that failed: `bpf(BPF_PROG_LOAD)`, `setns`, … */
	readonly syscall: string;
	/** What it was applied to: a path, a map, a program, an interface. */
	readonly subject: string;
	/** Only when a program was refused: everything the verifier said. */
	readonly log?: string;
}

export interface MapSpec {
	readonly name: string;
	/** `enum bpf_map_type`. */
	readonly type: number;
	readonly keySize: number;
	readonly valueSize: number;
	readonly maxEntries: number;
	readonly flags: number;
}

export interface MapInfo extends MapSpec {
	readonly id: number;
	/** Bytes that one lookup gives: `valueSize`, or, for per-CPU maps, one 8-byte-rounded slot for each possible CPU. */
	readonly lookupSize: number;
	/** 0 when the kernel kept no BTF for the map (sockmap and sockhash never have one). */
	readonly btfId: number;
}

export interface ProgramSpec {
	readonly name: string;
	/** ELF section, e.g. `cgroup/connect4`. */
	readonly section: string;
	/** `enum bpf_prog_type`. */
	readonly type: number;
	/** `enum bpf_attach_type`. */
	readonly attachType: number;
}

export interface ProgramInfo {
	readonly id: number;
	readonly name: string;
	readonly type: number;
	/** 16 hex digits: the kernel's hash over the instructions. */
	readonly tag: string;
	/** Nanoseconds since boot. */
	readonly loadedAtNs: bigint;
	/** 0 unless run statistics are on (sysctl `kernel.bpf_stats_enabled`, or {@link Native.enableStats}). */
	readonly runCount: bigint;
	readonly runTimeNs: bigint;
	readonly mapIds: readonly number[];
}

export interface LinkInfo {
	readonly id: number;
	/** `enum bpf_link_type`. */
	readonly type: number;
	readonly programId: number;
	/** `enum bpf_attach_type`; 0 for links that have none. */
	readonly attachType: number;
	/** cgroup id, netns inode or map id, by type; 0 when there is no target, or the target is gone. */
	readonly targetId: bigint;
}

export interface BpfMap {
	readonly fd: number;
	/** Asks the kernel (BPF_OBJ_GET_INFO_BY_FD) each time. */
	info(): MapInfo;
	/** The types of the object that made the map, raw; undefined when the kernel kept none ({@link MapInfo.btfId}). Needs CAP_SYS_ADMIN. */
	btf(): Uint8Array | undefined;
	/** Gives `lookupSize` bytes, or undefined when the key is absent. */
	lookup(key: Uint8Array): Uint8Array | undefined;
	/**
	@param value - `lookupSize` bytes. For sockmap/sockhash: `valueSize` bytes that hold the socket's fd.
	@param flags - 0 BPF_ANY, 1 BPF_NOEXIST (throws EEXIST), 2 BPF_EXIST (throws ENOENT).
	*/
	update(key: Uint8Array, value: Uint8Array, flags?: number): void;
	/** @returns whether the key was there. */
	delete(key: Uint8Array): boolean;
	/** The key after `key`, the first one without it; undefined at the end. A key that vanished restarts from the first. */
	nextKey(key?: Uint8Array): Uint8Array | undefined;
	/**
	All entries in one go: `count` keys of `keySize` and values of `lookupSize` bytes, packed, in no order.
	BPF_MAP_LOOKUP_BATCH in chunks where the kernel and the type have it, else one by one; an entry that is deleted meanwhile may be left out.
	*/
	entries(): {readonly count: number; readonly keys: Uint8Array; readonly values: Uint8Array};
	/** How many entries there are now (walks the keys; 0 for types without keys to walk). */
	count(): number;
	/** Pins at `path` on a bpffs; EEXIST if something is there. */
	pin(path: string): void;
	close(): void;
}

export interface BpfProgram {
	readonly fd: number;
	info(): ProgramInfo;
	pin(path: string): void;
	/** Attaches by a bpf_link; when the link is neither pinned nor held any more, the kernel detaches. `attachType` defaults to the program's own. */
	attachCgroup(cgroupPath: string, attachType?: number): BpfLink;
	/** sk_lookup and flow_dissector; `netnsFd` is {@link NetNs.fd}. */
	attachNetns(netnsFd: number, attachType?: number): BpfLink;
	/** sk_msg and sk_skb onto a sockmap/sockhash. Needs a kernel of 6.10; older ones say EINVAL. */
	attachMap(map: BpfMap, attachType?: number): BpfLink;
	/** Attaches without a link (BPF_PROG_ATTACH), for kernels before 6.10; undone by {@link detachMap} or the map's end. */
	attachMapLegacy(map: BpfMap, attachType?: number): void;
	detachMap(map: BpfMap, attachType?: number): void;
	/**
	BPF_PROG_TEST_RUN. Both sizes of the answer are bounded by what is given. ENOTSUPP (524) where the type has none.
	@returns the program's return value and the context and data after the run.
	*/
	testRun(input: {readonly context?: Uint8Array; readonly data?: Uint8Array; readonly repeat?: number}): {
		readonly returnValue: number;
		readonly context: Uint8Array;
		readonly data: Uint8Array;
		readonly durationNs: number;
	};
	close(): void;
}

export interface BpfLink {
	readonly fd: number;
	info(): LinkInfo;
	/** Replaces the running program in place: at no moment is there none. */
	update(program: BpfProgram): void;
	pin(path: string): void;
	/** Detaches now, even while pinned (BPF_LINK_DETACH, 5.9). */
	detach(): void;
	close(): void;
}

export interface BpfObject {
	/** The object's own BTF, raw (`.BTF` section). */
	btf(): Uint8Array;
	maps(): readonly MapSpec[];
	programs(): readonly ProgramSpec[];
	/** The initial bytes of a global data section, e.g. `.rodata`. */
	globals(section: string): Uint8Array;
	/** Replaces them; the size has to be the same. Only before load. */
	setGlobals(section: string, bytes: Uint8Array): void;
	/** Only before load. */
	setMaxEntries(map: string, maxEntries: number): void;
	/** Use this existing map instead of making a new one; EINVAL if it does not fit. Only before load. */
	reuseMap(name: string, map: BpfMap): void;
	/** Only before load. */
	setAutoload(program: string, on: boolean): void;
	/** Creates the maps, relocates and loads the programs. On refusal throws with `log` (never printed). */
	load(): void;
	/** After load: a handle with an fd of its own, so that it outlives the object. */
	map(name: string): BpfMap;
	/** After load: likewise. ENOENT for a program that was not loaded. */
	program(name: string): BpfProgram;
	close(): void;
}

export interface RingBuffer {
	/** Samples the kernel gave to JS so far. */
	readonly received: bigint;
	/** Keeps, or does not keep, the event loop alive. */
	ref(): void;
	unref(): void;
	close(): void;
}

/** A network namespace, held open. Holding one keeps it alive: close soon. */
export interface NetNs {
	readonly fd: number;
	/** st_dev and st_ino of the namespace file: its identity while it lives. */
	readonly device: bigint;
	readonly inode: bigint;
	/** SO_NETNS_COOKIE (5.14; ENOPROTOOPT before): never reused, what BPF programs see. */
	cookie(): bigint;
	/**
	A socket that lives in the namespace, made on a thread of its own, as setns would leak from a JS or pool thread into later calls.
	All calls on the fd then act in the namespace, whichever thread makes them. SOCK_CLOEXEC is added.
	@returns the fd; {@link Native.closeFd} closes it.
	*/
	socket(family: number, type: number, protocol: number): number;
	/** RTM_GETADDR of both families. `address` has 4 or 16 bytes; scope 0 is global, 253 link, 254 host. */
	addresses(): ReadonlyArray<{readonly family: 4 | 6; readonly address: Uint8Array; readonly prefixLength: number; readonly scope: number; readonly interfaceIndex: number; readonly interfaceName: string; readonly isLoopback: boolean; readonly isUp: boolean}>;
	/** RTM_GETROUTE of table 255 (local), both families. `type`: 2 local, 3 broadcast, 4 anycast, 5 multicast (RTN_*). */
	localRoutes(): ReadonlyArray<{readonly family: 4 | 6; readonly address: Uint8Array; readonly prefixLength: number; readonly type: number}>;
	/** Sets an interface up (RTM_NEWLINK, IFF_UP). */
	setUp(interfaceName: string): void;
	/** RTM_GETLINK: every interface. */
	interfaces(): ReadonlyArray<{readonly index: number; readonly name: string; readonly isLoopback: boolean; readonly isUp: boolean}>;
	/**
	RTM_GETROUTE, both families, every table; cached (cloned) routes are left out. `type` is RTN_* (1 unicast, 2 local, 6 blackhole, 7 unreachable, 8 prohibit);
	`interfaceIndex` is RTA_OIF, or that of the first next hop; 0 when it has none.
	*/
	routes(): ReadonlyArray<{readonly family: 4 | 6; readonly table: number; readonly type: number; readonly address: Uint8Array; readonly prefixLength: number; readonly interfaceIndex: number; readonly metric: number}>;
	/** RTM_GETRULE, both families. `mark` and `mask` are 0 for rules without fwmark; `table` is 0 for rules that do not look one up. */
	rules(): ReadonlyArray<{readonly family: 4 | 6; readonly priority: number; readonly table: number; readonly mark: number; readonly mask: number}>;
	/**
	`ip rule add|del fwmark MARK/MASK pref PRIORITY lookup TABLE`. `table`, `mark` and `mask` are at least 1: to the kernel 0 is any, and a delete
	could take its own rules.
	@returns false when it was there already (EEXIST), or was not there to delete (ENOENT).
	*/
	changeRule(change: 'add' | 'delete', rule: {readonly family: 4 | 6; readonly priority: number; readonly table: number; readonly mark: number; readonly mask: number}): boolean;
	/**
	`ip route add|del local ADDRESS/BITS dev INTERFACE table TABLE` (RTN_LOCAL, scope host). `address` has 4 or 16 bytes, `table` is at least 1.
	A delete takes an IPv6 route of another type too, if prefix, interface and table are the same: the kernel does not look. ENODEV without the interface.
	@returns false when it was there already (EEXIST), or was not there to delete (ESRCH).
	*/
	changeLocalRoute(change: 'add' | 'delete', route: {readonly address: Uint8Array; readonly prefixLength: number; readonly interfaceName: string; readonly table: number}): boolean;
	/**
	`ip addr add|del ADDRESS/BITS dev INTERFACE`, IPv6 without duplicate address detection. ENODEV without the interface.
	@returns false when it was there already (EEXIST), or was not there to delete (EADDRNOTAVAIL).
	*/
	changeAddress(change: 'add' | 'delete', address: {readonly address: Uint8Array; readonly prefixLength: number; readonly interfaceName: string}): boolean;
	/**
	Sysctls of the namespace, e.g. `net/ipv4/fwmark_reflect` below `procDirectory`/sys; read on one thread inside the namespace, as /proc/sys/net shows the
	namespace of who looks. Works through any writable mount of the host's /proc. ENOENT when the kernel does not have one; RangeError for a name that leads out.
	@returns the text of each without the newline.
	*/
	sysctls(procDirectory: string, names: readonly string[]): readonly string[];
	/** Writes one, in the same way. EINVAL when the kernel refuses the value. */
	setSysctl(procDirectory: string, name: string, value: string): void;
	/**
	Runs an iterator program (`iter/tcp`, `iter/bpf_sk_storage_map`) once inside the namespace: BPF_ITER_CREATE on a link of its own, read to the end. E2BIG when it writes
	more than 32 KiB for one socket.
	@param map - which map's elements it walks, in whatever namespace, where the program walks a map's.
	@returns what it wrote by bpf_seq_write.
	*/
	runIterator(program: BpfProgram, map?: BpfMap): Uint8Array;
	/**
	BPF_PROG_TEST_RUN of a packet program (SEC tc) on a thread inside the namespace, which is then the one that its socket look-ups search.
	@param data - the packet, 14 bytes at least.
	@returns the program's return value, and the packet after the run.
	*/
	testRun(program: BpfProgram, data: Uint8Array): {readonly returnValue: number; readonly data: Uint8Array};
	/**
	SOCK_DESTROY (sock_diag; 4.5, CONFIG_INET_DIAG_DESTROY): the socket with exactly this local and remote address gets ECONNABORTED, its peer a reset. Addresses have 4
	or 16 bytes, both the same; 4 bytes and their IPv4-mapped form name the same socket, of whichever family it is. Ports are in host order. EOPNOTSUPP when
	the kernel cannot.
	@param interfaceIndex - needed for a socket that is bound to a device (SO_BINDTODEVICE, link-local addresses): that device's.
	@returns false when there is no such socket: a listener and what TIME_WAIT leaves are none.
	*/
	destroyTcpSocket(local: {readonly address: Uint8Array; readonly port: number}, remote: {readonly address: Uint8Array; readonly port: number}, interfaceIndex?: number): boolean;
	close(): void;
}

/** A listening AF_UNIX SOCK_SEQPACKET socket. */
export interface SeqpacketListener {
	/** Takes connections again after `onError`. */
	resume(): void;
	/** Its file stays, its connections too. */
	close(): void;
}

export interface SeqpacketConnection {
	/** SO_PEERCRED: who connected, as this process' namespaces see it. */
	readonly peer: {readonly pid: number; readonly uid: number; readonly gid: number};
	/**
	Begins to read on the event loop: nothing is read before. EALREADY the second time. At most 4096 bytes of a packet are given, `isTruncated` tells of more; fds
	that come with it are not taken in.
	@param events - `onEnd` is called once, when the peer is gone or reading failed, and not for {@link close}; the connection is closed then. A packet of no
	bytes is an end, too. Throwing from either closes nothing; the error is uncaught in the usual way.
	*/
	read(events: {onPacket(bytes: Uint8Array, isTruncated: boolean): void; onEnd(error: NativeError | undefined): void}): void;
	/**
	sendmsg(2) of one packet without waiting and without SIGPIPE; EAGAIN when there is no room, EPIPE when the peer is gone.
	@param fd - handed over to the peer by SCM_RIGHTS; it stays this process' own, too.
	*/
	send(bytes: Uint8Array, fd?: number): void;
	close(): void;
}

export interface Native {
	/** The libbpf the addon runs with, e.g. `1.1`. */
	readonly libbpfVersion: string;
	/** @param source - a path, or the ELF file's bytes. `name` then names it in messages. */
	openObject(source: string | Uint8Array, name?: string): BpfObject;
	openPinnedMap(path: string): BpfMap;
	openPinnedProgram(path: string): BpfProgram;
	openPinnedLink(path: string): BpfLink;
	openMapById(id: number): BpfMap;
	openProgramById(id: number): BpfProgram;
	openLinkById(id: number): BpfLink;
	/** Ids of every loaded object of that kind on the host, ascending; ended by ENOENT. Needs CAP_SYS_ADMIN. */
	ids(kind: 'map' | 'program' | 'link'): readonly number[];
	/** Ids of programs that are attached to a cgroup for this `enum bpf_attach_type` (not effective ones of its parents). */
	cgroupPrograms(cgroupPath: string, attachType: number): readonly number[];
	/** Turns run counts on while the returned fd is open (BPF_ENABLE_STATS, 5.8). */
	enableStats(): number;
	/** Until no program that was replaced or detached before still runs (an RCU grace period: milliseconds). */
	waitForPrograms(): void;
	/**
	Reads a BPF_MAP_TYPE_RINGBUF on the event loop (libuv). One wake-up hands over at most `maxPerWakeup` samples (default 8192); the rest waits for
	the next turn of the loop, so that timers and sockets get theirs. Each sample is a copy.
	What the kernel could not reserve, only the program knows: it counts that itself.
	@param onSample - throwing from it closes nothing; the error is uncaught in the usual way.
	*/
	openRingBuffer(map: BpfMap, onSample: (sample: Uint8Array) => void, options?: {readonly maxPerWakeup?: number}): RingBuffer;

	/** A namespace by path (`/run/netns/x`, `/proc/1/ns/net`). EINVAL when the file is not a network namespace. */
	openNetns(path: string): NetNs;
	/** The namespace that a socket lives in (SIOCGSKNS), or of an fd of one. */
	netnsOfSocket(fd: number): NetNs;
	/** A new, empty namespace (unshare on a thread of its own); it ends when the handle and its sockets are closed. */
	createNetns(): NetNs;

	/**
	Listens at `path`, whose directory has to exist, with the file mode `mode` (less the umask). A socket file that nobody listens at any more is replaced; EADDRINUSE when
	somebody does, or when it is no socket.
	@param events - `onError`: a connection could not be taken (EMFILE, …). It waits, and no other is taken until {@link SeqpacketListener.resume}.
	*/
	listenSeqpacket(path: string, mode: number, events: {onConnection(connection: SeqpacketConnection): void; onError(error: NativeError): void}): SeqpacketListener;

	/** Thin, synchronous system calls on an fd; addresses are raw `sockaddr` bytes. */
	bind(fd: number, address: Uint8Array): void;
	listen(fd: number, backlog: number): void;
	/** EINPROGRESS is thrown like any errno. */
	connect(fd: number, address: Uint8Array): void;
	/** accept4 with SOCK_CLOEXEC and `flags`. */
	accept(fd: number, flags?: number): number;
	getsockname(fd: number): Uint8Array;
	getpeername(fd: number): Uint8Array;
	/** Gives as many bytes as the kernel said. SO_ORIGINAL_DST is (0, 80) with 16 bytes, IPv6's is (41, 80) with 28. */
	getsockopt(fd: number, level: number, name: number, length: number): Uint8Array;
	setsockopt(fd: number, level: number, name: number, value: Uint8Array): void;
	/** send(2) without waiting and without SIGPIPE; EAGAIN when there is no room. @returns how many bytes went. */
	send(fd: number, bytes: Uint8Array): number;
	/** recv(2) without waiting; EAGAIN when there is nothing. @returns what came; nothing at the stream's end. */
	receive(fd: number, length: number): Uint8Array;
	/** FIONREAD. */
	unread(fd: number): number;
	/** An epoll instance that watches one fd for EPOLLIN, edge-triggered. {@link closeFd} closes it. */
	watchEdges(fd: number): number;
	/** @returns whether there was an edge since the last call. */
	waitEdge(watcher: number, timeoutMs: number): boolean;
	/** poll(2) of one fd on the calling thread. @returns revents, 0 on time-out. */
	poll(fd: number, events: number, timeoutMs: number): number;
	closeFd(fd: number): void;

	/** Opens `path` (a directory) and takes flock(2) without waiting: EWOULDBLOCK when another has it. Released by {@link closeFd} or death. */
	lock(path: string, mode: 'exclusive' | 'shared'): number;
	/** mount(2) of a `bpf` file system at a directory that exists. */
	mountBpffs(path: string): void;
	/** umount2(2) with MNT_DETACH. */
	unmount(path: string): void;
	/** statfs(2) f_type: 0xcafe4a11n bpffs, 0x63677270n cgroup2, 0x6e736673n nsfs. */
	filesystemType(path: string): bigint;
	/** The cgroup id BPF programs see: the inode number of its directory on the cgroup2 mount (name_to_handle_at). */
	cgroupId(path: string): bigint;
	/** Effective capabilities of the process, as the kernel's bit mask (capget). */
	capabilities(): bigint;
	/** Possible CPUs: the slots of a per-CPU value. */
	possibleCpus(): number;
	/** How many handles (objects, maps, programs, links, ring buffers, namespaces, seqpacket listeners and connections) of this environment are open: for leak tests. */
	openHandles(): number;
}

/** `build/Release/sidestep.node`, from `src/` (tests through a loader) and from `dist/src/` alike. */
function addonPath(): string {
	for (const up of ['../', '../../']) {
		const path = fileURLToPath(new URL(`${up}build/Release/sidestep.node`, import.meta.url));
		if (existsSync(path)) {
			return path;
		}
	}

	throw new Error('the native addon build/Release/sidestep.node is not there: run `npm run build`');
}

export const native = createRequire(import.meta.url)(addonPath()) as Native;

export function isNativeError(error: unknown): error is NativeError {
	return error instanceof Error && typeof (error as Partial<NativeError>).errno === 'number' && typeof (error as Partial<NativeError>).syscall === 'string';
}
