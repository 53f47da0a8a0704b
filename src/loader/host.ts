/**
What the host has to offer: a bpffs, cgroup v2, capabilities.
*/
import {existsSync, mkdirSync, readFileSync} from 'node:fs';
import path from 'node:path';
import {HostError} from '../errors.js';
import {native} from '../native.js';

export const DEFAULT_BPFFS = '/sys/fs/bpf';
const BPF_FS_MAGIC = 0xca_fe_4a_11n;
const CGROUP2_MAGIC = 0x63_67_72_70n;

/** linux/capability.h. */
export const CAPABILITIES: ReadonlyMap<string, number> = new Map([
	['CAP_NET_ADMIN', 12],
	['CAP_SYS_PTRACE', 19],
	['CAP_SYS_ADMIN', 21],
	['CAP_PERFMON', 38],
	['CAP_BPF', 39],
]);

/** Names of those of {@link CAPABILITIES} that this process lacks. CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON, as in the kernel. */
export function missingCapabilities(effective = native.capabilities()): readonly string[] {
	const has = (name: string) => ((effective >> BigInt(CAPABILITIES.get(name)!)) & 1n) === 1n;
	return [...CAPABILITIES.keys()].filter(name => !has(name) && !(['CAP_BPF', 'CAP_PERFMON'].includes(name) && has('CAP_SYS_ADMIN')));
}

/** @throws HostError naming what is missing. */
export function requireCapabilities(): void {
	const missing = missingCapabilities();
	if (missing.length > 0) {
		throw new HostError(`this process lacks ${missing.join(', ')}`, 'run as root, or give the container these capabilities');
	}
}

/** @throws HostError when `proc` is not what shows the host's processes. */
export function requireProc(proc: string): void {
	if (!existsSync(path.join(proc, '1'))) {
		throw new HostError(`${proc} shows no process 1`, 'give the host\'s /proc by --proc; in a container it has to be mounted');
	}
}

export function isBpffs(directory: string): boolean {
	return existsSync(directory) && native.filesystemType(directory) === BPF_FS_MAGIC;
}

/**
Makes sure that a bpf file system is mounted at `directory`; mounts it if not.

@param proc - the host's /proc.
@throws HostError when it cannot be; and in a container, where the mount, with all pins, would go with the container.
*/
export function ensureBpffs(directory: string, proc: string): 'present' | 'mounted' {
	if (isBpffs(directory)) {
		return 'present';
	}

	if (!isHostMountNamespace(proc)) {
		throw new HostError(`no bpf file system at ${directory}, and one that is mounted here would end with this container, and capture with it`, `mount it on the node (mount -t bpf bpf ${DEFAULT_BPFFS}; systemd does by itself), and give it to the container`);
	}

	try {
		if (!existsSync(directory)) {
			mkdirSync(directory, {recursive: true, mode: 0o700});
		}

		native.mountBpffs(directory);
		return 'mounted';
	} catch (error) {
		throw new HostError(`no bpf file system at ${directory}`, `mount it (mount -t bpf bpf ${directory}), or name another place by --bpffs`, {cause: error});
	}
}

/** Whether what is mounted here is mounted for the host's process 1. No two mount namespaces share a mount's id; ns/mnt would tell too, but may be closed to us. */
function isHostMountNamespace(proc: string): boolean {
	const ids = (file: string) => readFileSync(file, 'utf8').trim().split('\n').map(line => line.split(' ')[0]!);
	const host = new Set(ids(path.join(proc, '1/mountinfo')));
	return ids('/proc/self/mountinfo').some(id => host.has(id));
}

/** Where cgroup v2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid hosts. `mounts` is /proc/self/mounts. */
export function findCgroup2(mounts = readFileSync('/proc/self/mounts', 'utf8')): string | undefined {
	for (const line of mounts.split('\n')) {
		const [, directory, type] = line.split(' ');
		if (type === 'cgroup2' && directory) {
			// Octal escapes: space, tab, newline and backslash.
			return directory.replaceAll(/\\(\d{3})/g, (_, octal: string) => String.fromCodePoint(Number.parseInt(octal, 8)));
		}
	}

	return undefined;
}

/**
The directory that the programs are attached to.

@param wanted - the user's choice; the root of cgroup v2 by default.
@throws HostError when there is no cgroup v2, or the choice is not on it.
*/
export function resolveCgroup(wanted: string | undefined): string {
	const directory = wanted ?? findCgroup2();
	if (directory === undefined) {
		throw new HostError('cgroup v2 is not mounted', 'mount it (mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified), or boot with systemd.unified_cgroup_hierarchy=1');
	}

	let type: bigint;
	try {
		type = native.filesystemType(directory);
	} catch (error) {
		throw new HostError(`cgroup ${directory} cannot be used`, 'name an existing cgroup v2 directory by --cgroup', {cause: error});
	}

	if (type !== CGROUP2_MAGIC) {
		throw new HostError(`${directory} is not on cgroup v2`, `name a directory below ${findCgroup2() ?? 'the cgroup2 mount'} by --cgroup`);
	}

	return directory;
}

/** The agent's own cgroup v2 directory, as far as it can be seen from here; the mount's root otherwise. */
export function ownCgroup(): string {
	const root = resolveCgroup(undefined);
	const own = /^0::(.*)$/m.exec(readFileSync('/proc/self/cgroup', 'utf8'))?.[1] ?? '/';
	const directory = path.join(root, own);
	return existsSync(directory) ? directory : root;
}

/** How far a cgroup is below the root of its mount: what bpf_get_current_ancestor_cgroup_id counts. */
export function cgroupLevel(directory: string): number {
	const root = resolveCgroup(undefined);
	const relative = path.relative(root, directory);
	return relative === '' ? 0 : relative.split(path.sep).length;
}
