/**
Reads what is true of a pod's network namespace now.
*/
import path from 'node:path';
import type {PodSpec} from '../config/pods-file.js';
import {PodError, hasErrno, reasonOf} from '../errors.js';
import {cgroupLevel} from '../loader/host.js';
import {addressFromBytes} from '../maps/address.js';
import {native, type NetNs} from '../native.js';
import type {PodFacts} from '../redirect/policy.js';

const SCOPE_GLOBAL = 0;
const RTN_LOCAL = 2;
/** As many levels as `exempt_cgroup_levels` in struct pod has bits. */
const CGROUP_LEVELS = 32;

/**
@param proc - the host's /proc: where pids are looked up, and where process 1's namespace is the host's own.
@throws PodError
*/
export function readPodFacts(spec: PodSpec, proc: string): PodFacts {
	const file = spec.netns ?? path.join(proc, String(spec.pid), 'ns/net');
	const netns = openNetns(spec, file);
	try {
		refuseHost(spec, netns, proc);
		return {
			cookie: netns.cookie(),
			device: netns.device,
			inode: netns.inode,
			addresses: netns.addresses()
				.filter(({scope, isLoopback, isUp}) => scope === SCOPE_GLOBAL && !isLoopback && isUp)
				.map(({address}) => addressFromBytes(address)),
			localRoutes: netns.localRoutes().map(({address, prefixLength, type}) => ({address: addressFromBytes(address), prefixLength, isUnicast: type === RTN_LOCAL})),
			cgroups: spec.exempt.cgroups.map(directory => cgroupFacts(spec, directory)),
		};
	} finally {
		// Held any longer, it would keep the namespace of a dead pod alive.
		netns.close();
	}
}

function openNetns(spec: PodSpec, file: string): NetNs {
	try {
		return native.openNetns(file);
	} catch (error) {
		const what = spec.pid === undefined ? `network namespace ${file}` : `process ${spec.pid}`;
		if (hasErrno(error, 'ENOENT', 'ESRCH')) {
			throw new PodError(spec.name, `its ${what} does not exist: start the pod, or take it out of the pods file`, {cause: error});
		}

		if (hasErrno(error, 'EINVAL', 'ENOTTY')) {
			throw new PodError(spec.name, `${file} is not a network namespace`, {cause: error});
		}

		throw new PodError(spec.name, `its ${what} cannot be opened (${reasonOf(error)})`, {cause: error});
	}
}

/**
The host's own connections must never be captured: kubelet, the runtime and node proxies live there. The host's namespace is that of process 1; where the
kernel lets nobody look at process 1, it is the one the agent itself lives in, as it does with hostNetwork.
*/
function refuseHost(spec: PodSpec, netns: NetNs, proc: string): void {
	for (const pid of ['1', 'self']) {
		let host: NetNs;
		try {
			host = native.openNetns(path.join(proc, pid, 'ns/net'));
		} catch (error) {
			if (pid === '1' && hasErrno(error, 'EACCES', 'EPERM')) {
				continue;
			}

			throw new PodError(spec.name, `cannot tell its namespace from the host's (${reasonOf(error)}): give the host's /proc by --proc`, {cause: error});
		}

		const same = host.inode === netns.inode && host.device === netns.device;
		host.close();
		if (same) {
			throw new PodError(spec.name, 'its network namespace is the host\'s own, which is never captured: pods with hostNetwork cannot be enrolled');
		}
	}
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
