/**
Joins the two sockets of a chatty connection, so that their bytes go past the TCP stack: what the program `pair` does, inside the namespaces of both.
*/
import type {Datapath} from './datapath.js';
import {addressToBytes} from '../maps/address.js';
import {PAIR_CLIENT, PAIR_SERVER, type NetnsCookie, type PairEnd, type PairRequest, type Pairing} from '../maps/schema.js';
import type {NetNs} from '../native.js';

const UNKNOWN: PairEnd = {cookie: 0n, sock: 0n, sndUna: 0, sndNxt: 0, rcvNxt: 0};

/**
@param open - opens a pod's namespace; undefined when it is not known.
@returns enum reason: REASON_ACCELERATED, or why not.
*/
export function joinPair({programs, schema}: Pick<Datapath, 'programs' | 'schema'>, request: PairRequest, open: (cookie: NetnsCookie) => NetNs | undefined): string {
	const opened = new Map<NetnsCookie, NetNs>();
	const codec = schema.codec<Pairing>('pairing');
	let pairing: Pairing = {request, client: UNKNOWN, server: UNKNOWN, here: 0, outcome: 'REASON_UNACCELERATED_GONE'};
	/** @returns whether nothing speaks against the pair so far. */
	const run = (cookie: NetnsCookie, here: number) => {
		const netns = opened.get(cookie) ?? open(cookie);
		if (!netns) {
			return false;
		}

		opened.set(cookie, netns);
		pairing = codec.decode(netns.testRun(programs.get('pair')!, codec.encode({...pairing, here})).data);
		return pairing.outcome === 'REASON_ACCELERATED';
	};

	try {
		if (request.netns === request.peerNetns) {
			run(request.netns, PAIR_CLIENT | PAIR_SERVER);
		} else if (run(request.netns, PAIR_CLIENT) && run(request.peerNetns, PAIR_SERVER)) {
			run(request.netns, PAIR_CLIENT);
		}

		if (pairing.outcome === 'REASON_UNACCELERATED_RACED') {
			const {netns, local, localPort, remote, remotePort} = request;
			opened.get(netns)?.destroyTcpSocket({address: addressToBytes(local), port: localPort}, {address: addressToBytes(remote), port: remotePort});
		}

		return pairing.outcome;
	} finally {
		for (const netns of opened.values()) {
			netns.close();
		}
	}
}
