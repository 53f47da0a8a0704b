/**
Reads what is true of a pod's network namespace now.
*/
import {existsSync, readdirSync, statSync} from 'node:fs';
import {isIPv4} from 'node:net';
import path from 'node:path';
import type {PodSpec} from '../config/pods-file.js';
import {NowhereError, PodError, hasErrno, reasonOf} from '../errors.js';
import {cgroupLevel} from '../loader/host.js';
import {addressFromBytes} from '../maps/address.js';
import {native, type NetNs} from '../native.js';
import type {NetnsCookie} from '../maps/schema.js';
import type {Capture} from '../redirect/capture.js';
import type {PodFacts} from '../redirect/policy.js';

const SCOPE_GLOBAL = 0;
const RTN_LOCAL = 2;
const TABLE_DEFAULT = 253;
const TABLE_MAIN = 254;
const TABLE_LOCAL = 255;
const NETNS_DIRECTORY = '/run/netns';
/** As many levels as `exempt_cgroup_levels` in struct pod has bits. */
const CGROUP_LEVELS = 32;

/** A namespace's name, and its identity while it had that name. */
export interface NetnsFile extends NetnsIdentity {
	readonly path: string;
}

/** An enrolled pod's. */
export interface PodNetns extends NetnsFile {
	readonly cookie: NetnsCookie;
}

/**
@param cookie - where it is known: inodes are given out again, cookies never.
@returns undefined when it is gone, or the name is another's by now.
*/
export function reopenNetns(file: NetnsFile, cookie?: NetnsCookie): NetNs | undefined {
	try {
		return openSame(file.path, file, cookie);
	} catch {
		return undefined;
	}
}

/**
The namespace of this name if it is still this one.

@throws the kernel's error when it cannot be opened for another reason than that it is gone.
*/
export function openSame(path: string, {device, inode}: NetnsIdentity, cookie: NetnsCookie | undefined): NetNs | undefined {
	let netns: NetNs;
	try {
		netns = native.openNetns(path);
	} catch (error) {
		if (hasErrno(error, 'ENOENT', 'ESRCH', 'ENOTDIR', 'EINVAL', 'EACCES', 'EPERM')) {
			return undefined;
		}

		throw error;
	}

	let isSame = false;
	try {
		isSame = netns.device === device && netns.inode === inode && (cookie === undefined || netns.cookie() === cookie);
	} finally {
		if (!isSame) {
			netns.close();
		}
	}

	return isSame ? netns : undefined;
}

/** A pod with its namespace held open. Close soon: held any longer, it would keep the namespace of a dead pod alive. */
export interface OpenedPod {
	readonly spec: PodSpec;
	readonly capture: Capture;
	readonly netns: NetNs;
	readonly file: NetnsFile;
	readonly facts: PodFacts;
}

/**
@param proc - the host's /proc: where pids are looked up, and where process 1's namespace is the host's own.
@throws PodError
*/
export function openPod(spec: PodSpec, capture: Capture, proc: string): OpenedPod {
	const file = spec.findNetns?.() ?? spec.netns ?? path.join(proc, String(spec.pid), 'ns/net');
	const netns = openNetns(spec, file);
	try {
		refuseHost(spec, netns, proc);
		return {spec, capture, netns, file: {path: file, device: netns.device, inode: netns.inode}, facts: readFacts(spec, capture, netns)};
	} catch (error) {
		netns.close();
		throw error;
	}
}

function readFacts(spec: PodSpec, capture: Capture, netns: NetNs): PodFacts {
	const routes = netns.routes();
	const cidr = ({address, prefixLength}: {readonly address: Uint8Array; readonly prefixLength: number}) => ({address: addressFromBytes(address), bits: prefixLength});
	const addresses = netns.addresses()
		.filter(({scope, isLoopback, isUp}) => scope === SCOPE_GLOBAL && !isLoopback && isUp)
		.map(({address}) => addressFromBytes(address));
	const localRoutes = routes.filter(({table}) => table === TABLE_LOCAL).map(route => ({...cidr(route), isUnicast: route.type === RTN_LOCAL}));
	return {
		cookie: netns.cookie(),
		device: netns.device,
		inode: netns.inode,
		addresses,
		// An IPv6 address has its route a moment after it is there (addrconf_dad_work).
		localRoutes: [
			...localRoutes,
			...addresses.filter(own => !localRoutes.some(({address}) => address === own)).map(address => ({address, bits: isIPv4(address) ? 32 : 128, isUnicast: true})),
		],
		// Of several with one prefix the kernel takes the one with the least metric, and whoever reads this the last.
		routes: routes.filter(({table}) => table === TABLE_MAIN || table === TABLE_DEFAULT)
			.sort((a, b) => b.metric - a.metric)
			.map(route => ({...cidr(route), interfaceIndex: route.interfaceIndex})),
		interfaces: capture.excludeInterfaces.length > 0 ? netns.interfaces() : [],
		cgroups: capture.exempt.cgroups.map(directory => cgroupFacts(spec, directory)),
	};
}

export interface NetnsIdentity {
	readonly device: bigint;
	readonly inode: bigint;
}

/**
Where to find the namespace that a pod had: by its identity, as what was said about it is gone by then. Through any process that lives in it, or a name
below /run/netns.

@returns undefined when nobody has it, so that it is about to end.
*/
export function findNetns(proc: string, identity: NetnsIdentity, cookie: NetnsCookie): NetNs | undefined {
	return scanNetns(proc).open(identity, cookie);
}

/** What {@link findNetns} finds, for many: looked for once. */
export interface NetnsScan {
	/** Names of it, /run/netns first. */
	files(identity: NetnsIdentity): readonly string[];
	/** @throws the kernel's error when it cannot be opened for another reason than that it is gone. */
	open(identity: NetnsIdentity, cookie: NetnsCookie): NetNs | undefined;
	/** Most could not be looked at, for lack of CAP_SYS_PTRACE: that one is not found says nothing. */
	readonly isBlind: boolean;
}

export function scanNetns(proc: string): NetnsScan {
	const names = (directory: string) => existsSync(directory) ? readdirSync(directory) : [];
	const found = new Map<string, string[]>();
	let seen = 0;
	let refused = 0;
	for (const file of [
		...names(NETNS_DIRECTORY).map(name => path.join(NETNS_DIRECTORY, name)),
		...names(proc).filter(name => /^\d+$/.test(name)).map(pid => path.join(proc, pid, 'ns/net')),
	]) {
		try {
			const {dev, ino} = statSync(file, {bigint: true});
			seen++;
			const id = `${dev} ${ino}`;
			const others = found.get(id);
			if (others) {
				others.push(file);
			} else {
				found.set(id, [file]);
			}
		} catch (error) {
			refused += hasErrno(error, 'EACCES', 'EPERM') ? 1 : 0;
		}
	}

	const files = ({device, inode}: NetnsIdentity) => found.get(`${device} ${inode}`) ?? [];
	return {
		files,
		isBlind: refused > seen,
		open(identity, cookie) {
			for (const file of files(identity)) {
				const netns = openSame(file, identity, cookie);
				if (netns) {
					return netns;
				}
			}

			return undefined;
		},
	};
}

/** The node's own namespace: of process 1, or, where nobody may look at that, the one this process lives in, as with hostNetwork. */
export function openNodeNetns(proc: string): NetNs {
	try {
		return native.openNetns(path.join(proc, '1/ns/net'));
	} catch (error) {
		if (hasErrno(error, 'EACCES', 'EPERM')) {
			return native.openNetns('/proc/self/ns/net');
		}

		throw error;
	}
}

function openNetns(spec: PodSpec, file: string): NetNs {
	try {
		return native.openNetns(file);
	} catch (error) {
		const what = spec.pid === undefined ? `network namespace ${file}` : `process ${spec.pid}`;
		if (hasErrno(error, 'ENOENT', 'ESRCH')) {
			throw new NowhereError(spec.name, `its ${what} does not exist: start the pod, or take it out of the pods file`, {cause: error});
		}

		if (hasErrno(error, 'EINVAL', 'ENOTTY')) {
			throw new NowhereError(spec.name, `${file} is not a network namespace`, {cause: error});
		}

		throw new PodError(spec.name, `its ${what} cannot be opened (${reasonOf(error)})`, {cause: error});
	}
}

/** The host's own connections must never be captured: kubelet, the runtime and node proxies live there. */
function refuseHost(spec: PodSpec, netns: NetNs, proc: string): void {
	let isHost: boolean;
	try {
		isHost = isHostNetns(netns, proc);
	} catch (error) {
		throw new PodError(spec.name, `cannot tell its namespace from the host's (${reasonOf(error)}): give the host's /proc by --proc`, {cause: error});
	}

	if (isHost) {
		throw new NowhereError(spec.name, 'its network namespace is the host\'s own, which is never captured: pods with hostNetwork cannot be enrolled');
	}
}

/** Whether it is the node's, or the one that this process lives in. */
export function isHostNetns(netns: NetNs, proc: string): boolean {
	return [() => openNodeNetns(proc), () => native.openNetns('/proc/self/ns/net')].some(open => {
		const host = open();
		host.close();
		return host.inode === netns.inode && host.device === netns.device;
	});
}

function cgroupFacts(spec: PodSpec, directory: string): {readonly id: bigint; readonly level: number} {
	try {
		const level = cgroupLevel(directory);
		if (level >= CGROUP_LEVELS) {
			throw new RangeError(`it is ${level} levels deep, at most ${CGROUP_LEVELS - 1} are possible`);
		}

		if (native.filesystemType(directory) !== 0x63_67_72_70n) {
			throw new TypeError('it is not on cgroup v2');
		}

		return {id: native.cgroupId(directory), level};
	} catch (error) {
		throw new PodError(spec.name, `its exempt cgroup ${directory} cannot be used (${reasonOf(error)})`, {cause: error});
	}
}
