/**
Random policies, as annotations, and random flows, as real sockets, in two pods: under Istio's real iptables rules and under sidestep. Where each flow comes
out is what CAPTURE.md says, read plainly. SIDESTEP_SEED repeats a run.
*/
import test from 'ava';
import type {Capture, Cidr} from '../../src/redirect/capture.js';
import {drawCapture, drawFlow, randomOf, readContract, type Flow} from '../helpers/contract.js';
import {SIDECAR_ID, ambientRules, sidecarRules} from '../helpers/istio-rules.js';
import type {Running} from '../helpers/process.js';
import {World, type Pod} from '../helpers/world.js';

const POLICIES = 12;
const FLOWS = 40;
/** A flow that is captured comes out at once; this is for a busy machine. */
const WAIT_MS = 500;
const LISTENERS = new Set([15_001, 15_006, 15_053]);

interface Side {
	readonly pod: Pod;
	readonly flows: Running;
}

async function ask({flows}: {readonly flows: Running}, line: string): Promise<string> {
	const count = flows.lines().length;
	flows.child.stdin!.write(`${line}\n`);
	await flows.until(line, () => flows.lines().length > count);
	return flows.lines<string>().at(-1)!;
}

const end = (address: string, port: number) => address === '' || address.includes(':') ? `[${address || '::'}]:${port}` : `${address}:${port}`;

/** Where the flow came out, by what the pod's listeners saw. */
async function send(side: Side, far: {readonly flows: Running}, flow: Flow, wait: number): Promise<string> {
	const {direction, protocol, source, destination, mark, uid, gid} = flow;
	const to = end(destination.address, destination.port);
	if (direction === 'in') {
		await ask(far, `${protocol} ${to} - 0 0 0 0`);
		return (await ask(side, `look ${wait}`)).split(' ')[0]!;
	}

	const from = source.isBound ? end(source.address, 0) : '-';
	return (await ask(side, `${protocol} ${to} ${from} ${mark} ${uid} ${gid} ${wait}`)).split(' ')[0]!;
}

const ranges = (list: readonly Cidr[]) => list.map(({address, bits}) => `${address || '::'}/${bits}`).join(',');

function annotationsOf({outbound, inbound}: Capture): Record<string, string> {
	return {
		includeOutboundIPRanges: outbound.includeRanges === '*' ? '*' : ranges(outbound.includeRanges),
		excludeOutboundIPRanges: ranges(outbound.excludeRanges),
		includeOutboundPorts: outbound.includePorts.join(','),
		excludeOutboundPorts: outbound.excludePorts.join(','),
		includeInboundPorts: inbound ? inbound.includePorts === '*' ? '*' : inbound.includePorts.join(',') : '',
		...inbound?.includePorts === '*' ? {excludeInboundPorts: inbound.excludePorts.join(',')} : {},
	};
}

function entry(pod: Pod, capture: Capture, number: number): object {
	const annotations = capture.mode === 'sidecar'
		? Object.fromEntries(Object.entries(annotationsOf(capture)).map(([name, value]) => [`traffic.sidecar.istio.io/${name}`, value]))
		: capture.inbound ? {} : {'ambient.istio.io/bypass-inbound-capture': 'true'};
	return {name: `test/policy-${number}`, netns: pod.netns, mode: capture.mode, dns: capture.dns !== undefined, annotations};
}

/** As its own address on each side is another. */
function isDrawable(capture: Capture, flow: Flow, own: readonly string[]): boolean {
	// Istio's rules spare 0x111 O6, and not O2 and O3: a difference that the README names.
	const isReplyMark = capture.mode === 'ambient' && (flow.mark & 0xfff) === 0x111;
	// Broadcasts come back.
	const isToListener = LISTENERS.has(flow.destination.port) && (own.includes(flow.destination.address) || /^(?:127\.|22\d|23\d|255|ff|0\.0\.0\.0$|::[16]?$|$)/.test(flow.destination.address));
	return !isReplyMark && !isToListener && !flow.fromNode && !flow.interfaceExcluded;
}

test(`${POLICIES * FLOWS} flows under ${POLICIES} policies come out as under iptables`, async t => {
	t.timeout(120_000);
	const seed = Number(process.env['SIDESTEP_SEED'] ?? Date.now() % 1_000_000_007);
	t.log(`SIDESTEP_SEED=${seed}`);
	const random = randomOf(seed);
	const world = World.create(t);
	const listen = async (pod: Pod, ...options: readonly string[]): Promise<Side> => {
		const flows = pod.start([world.program('flows'), ...options]);
		await flows.until('ready', () => flows.stdout.includes('"ready":true'));
		flows.stdout = '';
		return {pod, flows};
	};

	const far = await listen(world.pod('far'), '--silent');
	const ours = await listen(world.pod('sidestep'));
	const agent = await world.agent([]);
	const seen = new Map<string, number>();
	for (let number = 0; number < POLICIES;) {
		const drawn = drawCapture(random);
		const capture = drawn.proxy ? {...drawn, proxy: {uid: SIDECAR_ID, gid: SIDECAR_ID}} : drawn;
		if (capture.mode === 'proxy' || (number % 3 === 0 && !capture.dns)) {
			continue;
		}

		const theirs = await listen(world.pod(`iptables-${number}`));
		if (capture.mode === 'sidecar') {
			sidecarRules(theirs.pod, annotationsOf(capture), {dns: capture.dns !== undefined});
		} else {
			ambientRules(theirs.pod, {dns: capture.dns !== undefined, bypassInbound: !capture.inbound});
		}

		const from = agent.running.stderr.length;
		world.writePods([entry(ours.pod, capture, number)]);
		await agent.says(/(?:enrol|update) test\/policy/, from);
		await agent.ready();
		for (let index = 0; index < FLOWS; index++) {
			const own = [[theirs.pod.ipv4, theirs.pod.ipv6], [ours.pod.ipv4, ours.pod.ipv6]] as const;
			let flow: Flow;
			do {
				flow = drawFlow(random, capture, {ownAddresses: own[0]});
			} while (!isDrawable(capture, flow, own[0]));

			for (const [side, ownAddresses] of [[theirs, own[0]], [ours, own[1]]] as const) {
				const translate = (address: string) => own[0].includes(address) ? ownAddresses[own[0].indexOf(address)]! : address;
				const here = {...flow, destination: {...flow.destination, address: translate(flow.destination.address)}, source: {...flow.source, address: translate(flow.source.address)}};
				const wanted = readContract(capture, {ownAddresses}, here);
				const outcome = await send(side, far, here, wanted === 'pass' ? 0 : WAIT_MS);
				if (outcome !== wanted) {
					t.fail(`seed ${seed}, ${side.pod.name}: ${outcome} instead of ${wanted}: ${JSON.stringify(here)} under ${JSON.stringify(capture).slice(0, 3000)}`);
				}

				seen.set(wanted, (seen.get(wanted) ?? 0) + 1);
			}
		}

		await theirs.flows.stop('SIGKILL');
		number++;
	}

	t.log(Object.fromEntries(seen));
	t.is(seen.size, 4, 'every outcome was drawn');
});
