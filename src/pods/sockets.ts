/**
The TCP sockets of a pod, with what became of them and what would become of them now.
*/
import type {Datapath} from '../loader/datapath.js';
import {addressToBytes} from '../maps/address.js';
import {KEPT_SOURCE_MARK, KEPT_SOURCE_MASK, reasonName, type SocketRecord} from '../maps/schema.js';
import type {NetNs} from '../native.js';

const TCP_CLOSE = 7;
const TCP_LISTEN = 10;
const STATES = ['', 'established', 'syn_sent', 'syn_recv', 'fin_wait1', 'fin_wait2', 'time_wait', 'close', 'close_wait', 'last_ack', 'listen', 'closing'];

export interface PodSocket {
	readonly record: SocketRecord;
	readonly direction: 'in' | 'out' | 'listen';
	readonly state: string;
	/** Its decision, were it made now: one of the counters' reasons. */
	readonly reason: string;
	/** Captured, by the application or towards the proxy. */
	readonly isCaptured: boolean;
	/** It would be captured if it were made now, and is not: it is older than the pod's enrolment or policy. */
	readonly isMissed: boolean;
}

export function readSockets({programs, schema}: Pick<Datapath, 'programs' | 'schema'>, netns: NetNs): readonly PodSocket[] {
	const codec = schema.codec<SocketRecord>('socket_record');
	const bytes = netns.runIterator(programs.get('sockets')!);
	const records = Array.from({length: bytes.length / codec.size}, (_, index) => codec.decode(bytes.subarray(index * codec.size, (index + 1) * codec.size)));
	const listening = new Set(records.filter(({state}) => state === TCP_LISTEN).map(({localPort}) => localPort));
	return records.filter(({state}) => state !== TCP_CLOSE).map(record => {
		const isListener = record.state === TCP_LISTEN;
		// What was accepted has its listener's port; of what was connected, the kernel knows no more than the port it chose.
		const direction = isListener ? 'listen' : listening.has(record.localPort) ? 'in' : 'out';
		const reason = isListener ? '' : reasonName(direction === 'in' ? record.inbound : record.outbound);
		const isCaptured = record.role !== 0;
		return {record, direction, state: STATES[record.state] ?? String(record.state), reason, isCaptured, isMissed: !isCaptured && /^(?:redirected|steered)/.test(reason)};
	});
}

const LOOPBACK_INTERFACE = 1;

/**
Aborts IPv6 connections that the proxy made under clients' addresses, both ends: without the namespace's settings there is no route for their answers. IPv4 needs none,
as they are tied to lo.
*/
export function resetKeptSources(sockets: readonly PodSocket[], netns: NetNs): void {
	for (const {record, direction} of sockets) {
		if (direction !== 'listen' && record.local.includes(':') && (record.mark & KEPT_SOURCE_MASK) === KEPT_SOURCE_MARK) {
			abort(record, netns);
		}
	}
}

/**
Aborts those that are accelerated: without the programs, what they have not read yet would be lost without a word.

@returns how many.
*/
export function resetAccelerated(sockets: readonly PodSocket[], netns: NetNs): number {
	return sockets.filter(({record}) => record.accelerated === 1 && abort(record, netns)).length;
}

/** Aborts those that are missed, as iptables rules do to connections that are older than they. @returns how many. */
export function resetMissed(sockets: readonly PodSocket[], netns: NetNs): number {
	return sockets.filter(({isMissed, record}) => isMissed && abort(record, netns)).length;
}

/** The proxy's connections under clients' addresses are tied to lo. */
function abort({local, remote, localPort, remotePort}: SocketRecord, netns: NetNs): boolean {
	const ends = [{address: addressToBytes(local), port: localPort}, {address: addressToBytes(remote), port: remotePort}] as const;
	return netns.destroyTcpSocket(...ends) || netns.destroyTcpSocket(...ends, LOOPBACK_INTERFACE);
}
