import {mkdirSync, mkdtempSync, readFileSync, readdirSync, readlinkSync, rmdirSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import type {ExecutionContext} from 'ava';
import {type BpfMap, type BpfObject, type NativeError, type NetNs, isNativeError, native} from '../../src/native.js';

if (process.getuid!() !== 0) {
	throw new Error('these tests load BPF programs and make network namespaces: run them as root');
}

export const AF_INET = 2;
export const SOCK_STREAM = 1;

export const fixture = (name: string): string => fileURLToPath(new URL(`../../../build/test/${name}.bpf.o`, import.meta.url));

export const child = (name: string): string => fileURLToPath(new URL(`children/${name}.js`, import.meta.url));

type Closable = {close(): void};

/** Closed at the end of the test, whatever happens. */
export function held<Kind extends Closable>(t: ExecutionContext, handle: Kind): Kind {
	t.teardown(() => {
		handle.close();
	});
	return handle;
}

export function opened(t: ExecutionContext, name: string): BpfObject {
	return held(t, native.openObject(fixture(name)));
}

/** `prepare` runs between open and load. */
export function loaded(t: ExecutionContext, name: string, prepare?: (object: BpfObject) => void): BpfObject {
	const object = opened(t, name);
	prepare?.(object);
	object.load();
	return object;
}

export const mapOf = (t: ExecutionContext, object: BpfObject, name: string): BpfMap => held(t, object.map(name));

/** What `act` throws, which has to come from the kernel with this code. */
export function kernelError(t: ExecutionContext, code: string, act: () => unknown): NativeError {
	const error = t.throws(act);
	t.true(isNativeError(error), `${String(error)} has errno and syscall`);
	t.is((error as NativeError).code, code, error?.message);
	return error as NativeError;
}

export const u32 = (...values: number[]): Uint8Array => new Uint8Array(Uint32Array.from(values).buffer);
export const u64 = (...values: bigint[]): Uint8Array => new Uint8Array(BigUint64Array.from(values).buffer);
export const readU32 = (bytes: Uint8Array, index = 0): number => new DataView(bytes.buffer, bytes.byteOffset).getUint32(4 * index, true);
export const readU64 = (bytes: Uint8Array, index = 0): bigint => new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(8 * index, true);

/** struct sockaddr_in: family in host order, port in network order. */
export function sockaddr(address: readonly [number, number, number, number], port: number): Uint8Array {
	return Uint8Array.of(AF_INET, 0, port >> 8, port & 0xff, ...address, 0, 0, 0, 0, 0, 0, 0, 0);
}

export const portOf = (name: Uint8Array): number => name[2]! << 8 | name[3]!;

export function network(t: ExecutionContext): NetNs {
	const netns = held(t, native.createNetns());
	netns.setUp('lo');
	return netns;
}

/** A TCP socket inside `netns`, closed with the test. */
export function tcp(t: ExecutionContext, netns: NetNs): number {
	const fd = netns.socket(AF_INET, SOCK_STREAM, 0);
	t.teardown(() => {
		native.closeFd(fd);
	});
	return fd;
}

/** A listener on 127.0.0.1 of `netns`, at a port that the kernel chose. */
export function listener(t: ExecutionContext, netns: NetNs): {readonly fd: number; readonly port: number} {
	const fd = tcp(t, netns);
	native.bind(fd, sockaddr([127, 0, 0, 1], 0));
	native.listen(fd, 16);
	return {fd, port: portOf(native.getsockname(fd))};
}

/** A bpffs of the test's own. */
export function bpffs(t: ExecutionContext): string {
	const directory = mkdtempSync(path.join(tmpdir(), 'sidestep-native-'));
	native.mountBpffs(directory);
	t.teardown(() => {
		native.unmount(directory);
		rmdirSync(directory);
	});
	return directory;
}

/** A child of the cgroup2 mount, which may be beside cgroup v1 ones. */
export function cgroup(t: ExecutionContext): string {
	const mount = readFileSync('/proc/self/mounts', 'utf8').split('\n').map(line => line.split(' ')).find(fields => fields[2] === 'cgroup2');
	if (!mount) {
		throw new Error('no cgroup2 file system is mounted');
	}

	const directory = path.join(mount[1]!, `sidestep-native-${process.pid}-${++cgroups}`);
	mkdirSync(directory);
	t.teardown(() => {
		rmdirSync(directory);
	});
	return directory;
}

let cgroups = 0;

export const openFds = (): number => readdirSync('/proc/self/fd').length;

/** How many fds there are of each kind, e.g. `anon_inode:bpf-map`, `net`, `socket`: says what leaked, not only that something did. */
export function fdKinds(): Record<string, number> {
	const kinds: Record<string, number> = {};
	for (const fd of readdirSync('/proc/self/fd')) {
		try {
			const kind = readlinkSync(`/proc/self/fd/${fd}`).replace(/:\[\d+]$/, '');
			kinds[kind] = (kinds[kind] ?? 0) + 1;
		} catch {
			// The one that lists the directory.
		}
	}

	return kinds;
}

const AF_UNIX = 1;
const SOCK_SEQPACKET = 5;
const SOCK_NONBLOCK = 0o4000;

/** @returns the fd of a connected SOCK_SEQPACKET socket, nonblocking. */
export function connectSeqpacket(file: string): number {
	const netns = native.openNetns('/proc/self/ns/net');
	const fd = netns.socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0);
	netns.close();
	try {
		native.connect(fd, Buffer.concat([Buffer.of(AF_UNIX, 0), Buffer.from(file), Buffer.of(0)]));
	} catch (error) {
		native.closeFd(fd);
		throw error;
	}

	return fd;
}
