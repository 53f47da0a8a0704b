/**
Joins the two sockets of a chatty connection, so that their bytes go past the TCP stack: the program `pair` chooses them, inside the namespaces of both, and `join` puts them
into the map `accelerated`.
*/
import type {Datapath} from './datapath.js';
import {addressToBytes} from '../maps/address.js';
import {PAIR_CLIENT, PAIR_SERVER, type Joined, type NetnsCookie, type PairEnd, type PairRequest, type Pairing} from '../maps/schema.js';
import type {NetNs} from '../native.js';

const UNKNOWN: PairEnd = {cookie: 0n, sock: 0n, sndUna: 0, sndNxt: 0, rcvNxt: 0};
const ACCELERATED = 'REASON_ACCELERATED';

/**
@param open - opens a pod's namespace; undefined when it is not known.
@returns enum reason: REASON_ACCELERATED, or why not; counted for the pod that asked.
*/
export function joinPair({programs, schema, rawMaps}: Pick<Datapath, 'programs' | 'schema' | 'rawMaps'>, request: PairRequest, open: (cookie: NetnsCookie) => NetNs | undefined): string {
	const opened = new Map<NetnsCookie, NetNs>();
	const codec = schema.codec<Pairing>('pairing');
	let pairing: Pairing = {request, client: UNKNOWN, server: UNKNOWN, here: 0, outcome: ACCELERATED};
	const pair = programs.get('pair')!;
	/** @returns whether nothing speaks against the pair so far. */
	const choose = (cookie: NetnsCookie, here: number) => {
		const netns = opened.get(cookie) ?? open(cookie);
		if (netns) {
			opened.set(cookie, netns);
			pairing = codec.decode(netns.testRun(pair, codec.encode({...pairing, here})).data);
		} else {
			pairing = {...pairing, outcome: 'REASON_UNACCELERATED_GONE'};
		}

		return pairing.outcome === ACCELERATED;
	};

	const join = (netns: NetNs) => {
		const each = schema.codec<Joined>('joined');
		const bytes = netns.runIterator(programs.get('join')!, rawMaps.get('joining')!);
		const outcomes = Array.from({length: bytes.length / each.size}, (_, index) => each.decode(bytes.subarray(index * each.size, (index + 1) * each.size)).outcome);
		return outcomes.find(outcome => outcome !== ACCELERATED) ?? ACCELERATED;
	};

	try {
		const {netns, peerNetns} = request;
		const chosen = netns === peerNetns
			? choose(netns, PAIR_CLIENT | PAIR_SERVER)
			: choose(netns, PAIR_CLIENT) && choose(peerNetns, PAIR_SERVER) && choose(netns, PAIR_CLIENT);
		const outcome = chosen ? join(opened.get(netns)!) : pairing.outcome;
		pair.testRun({data: codec.encode({...pairing, here: 0, outcome})});
		if (outcome === 'REASON_UNACCELERATED_RACED') {
			const {local, localPort, remote, remotePort} = request;
			opened.get(netns)!.destroyTcpSocket({address: addressToBytes(local), port: localPort}, {address: addressToBytes(remote), port: remotePort});
		}

		return outcome;
	} finally {
		for (const netns of opened.values()) {
			netns.close();
		}
	}
}
