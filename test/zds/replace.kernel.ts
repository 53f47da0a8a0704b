/**
ztunnel is replaced while 200 pods are busy: what fails, beside pods under Istio's iptables rules that the same two ztunnels serve at the same time.
*/
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {native} from '../../src/native.js';
import {ZdsServer} from '../../src/zds/server.js';
import {ambientRules} from '../helpers/istio-rules.js';
import type {Running} from '../helpers/process.js';
import {World, type ManyResult, type Pod} from '../helpers/world.js';

const STEERED = 180;
/** Divides the other. */
const REFERENCES = 20;
/** So many of each kind also have an application that is connected to. */
const SERVERS = 20;
const INBOUND_CLIENTS = 8;
const PORT = 8080;

const serversOf = (pods: readonly Pod[]) => pods.filter((_, index) => index % (pods.length / SERVERS) === 0);
const appsOf = (pods: readonly Pod[]) => serversOf(pods).map(({ipv4}) => `${ipv4}:${PORT}`);

const ambient = (pod: Pod) => ({name: `test/${pod.name}`, netns: pod.netns, mode: 'ambient'});

interface Node {
	readonly world: World;
	readonly far: Pod;
	readonly kinds: Readonly<Record<'sidestep' | 'iptables', readonly Pod[]>>;
	readonly server: ZdsServer;
	ztunnel(): Promise<Running>;
}

async function setUp(t: ExecutionContext): Promise<Node> {
	const world = World.create(t);
	const far = world.pod('far');
	await far.server(`${far.ipv4}:${PORT}`);
	const steered = Array.from({length: STEERED}, (_, index) => world.pod(`s${index}`));
	const references = Array.from({length: REFERENCES}, (_, index) => world.pod(`r${index}`));
	for (const pod of references) {
		ambientRules(pod);
	}

	for (const pod of [...serversOf(steered), ...serversOf(references)]) {
		await pod.server(`${pod.ipv4}:${PORT}`);
	}

	const socketPath = `${world.directory}/ztunnel.sock`;
	const server = new ZdsServer({socketPath, log: line => {
		t.log(line);
	}});
	world.onEnd(() => {
		server.close();
	});
	server.listen();
	await world.agent(steered.map(ambient));
	// In turn, as ztunnel opens and closes their listeners in this order: no kind comes first.
	const pods = references.flatMap((pod, index) => [pod, ...steered.slice(index * STEERED / REFERENCES, (index + 1) * STEERED / REFERENCES)]);
	for (const pod of pods) {
		const openNetns = () => native.openNetns(pod.netns);
		const netns = openNetns();
		server.put({uid: pod.name, name: pod.name, namespace: 'test', serviceAccount: 'default', cookie: netns.cookie(), openNetns});
		netns.close();
	}

	return {
		world, far, server, kinds: {sidestep: steered, iptables: references},
		async ztunnel() {
			const running = world.node.start([world.program('ztunnel'), '--zds', socketPath, '--brief']);
			await running.until('it has its snapshot', () => server.connections.some(({pid, isSnapshotDone}) => pid === running.child.pid && isSnapshotDone));
			t.true(pods.every(pod => server.state(pod.name).kind === 'acknowledged'));
			return running;
		},
	};
}

interface Load {
	readonly outbound: readonly Running[];
	readonly inbound: readonly Running[];
}

type Kind = keyof Node['kinds'];
type Totals = Readonly<Record<Kind, Readonly<Record<keyof Load, ManyResult>>>>;

const ENDLESS = ['--count', '1000000000', '--pause', '50'];

function start({kinds, far}: Node): Readonly<Record<Kind, Load>> {
	const load = (pods: readonly Pod[]): Load => ({
		outbound: pods.map(pod => pod.startClients([`${far.ipv4}:${PORT}`], ENDLESS)),
		inbound: [far.startClients(appsOf(pods), [...ENDLESS, '--parallel', String(INBOUND_CLIENTS)])],
	});
	return {sidestep: load(kinds.sidestep), iptables: load(kinds.iptables)};
}

async function stop(load: readonly Running[]): Promise<ManyResult> {
	const results = await Promise.all(load.map(async running => {
		await running.stop();
		return running.lines<ManyResult>().at(-1)!;
	}));
	const errors: Record<string, number> = {};
	for (const [name, count] of results.flatMap(result => Object.entries(result.errors))) {
		errors[name] = (errors[name] ?? 0) + count;
	}

	const sum = (of: (result: ManyResult) => number) => results.map(of).reduce((a, b) => a + b, 0);
	return {ok: sum(({ok}) => ok), failed: sum(({failed}) => failed), wrong_peer: sum(({wrong_peer}) => wrong_peer), errors};
}

/** What happened to the connections that were made around `replace`. */
async function under(t: ExecutionContext, node: Node, title: string, replace: () => Promise<void>): Promise<Totals> {
	const loads = start(node);
	await sleep(1000);
	await replace();
	await sleep(1000);
	const totals = {} as Record<Kind, Record<keyof Load, ManyResult>>;
	for (const kind of ['sidestep', 'iptables'] as const) {
		totals[kind] = {outbound: await stop(loads[kind].outbound), inbound: await stop(loads[kind].inbound)};
		t.log(`${title}, ${kind}, ${node.kinds[kind].length} pods: ${JSON.stringify(totals[kind])}`);
	}

	return totals;
}

/** Each client has one connection at a time, and may lose that one, and one more while the old ztunnel's sockets are being closed; none finds nobody. */
function losesOnlyWhatRan(t: ExecutionContext, totals: Totals): void {
	for (const [kind, {outbound, inbound}] of Object.entries(totals)) {
		t.like({...outbound.errors, ...inbound.errors}, {ECONNREFUSED: undefined, TIMEOUT: undefined}, kind);
		t.true(outbound.failed <= 2 * (kind === 'sidestep' ? STEERED : REFERENCES), kind);
		t.true(inbound.failed <= 2 * INBOUND_CLIENTS, kind);
	}
}

test.serial('ztunnel is replaced under the load of 200 pods, as under iptables', async t => {
	t.timeout(600_000);
	const node = await setUp(t);
	let ztunnel = await node.ztunnel();

	losesOnlyWhatRan(t, await under(t, node, 'drained', async () => {
		const next = await node.ztunnel();
		await ztunnel.stop('SIGTERM');
		ztunnel = next;
	}));
	losesOnlyWhatRan(t, await under(t, node, 'killed, the next one is there', async () => {
		const next = await node.ztunnel();
		await ztunnel.stop('SIGKILL');
		ztunnel = next;
	}));
	losesOnlyWhatRan(t, await under(t, node, 'the next one is killed, the old one is there', async () => {
		const next = await node.ztunnel();
		await next.stop('SIGKILL');
	}));

	const {sidestep, iptables} = await under(t, node, 'killed, then the next one comes', async () => {
		await ztunnel.stop('SIGKILL');
		for (const pods of Object.values(node.kinds)) {
			t.like(await node.far.clients(appsOf(pods), ['--count', String(2 * SERVERS)]), {ok: 0, errors: {ECONNREFUSED: 2 * SERVERS}});
		}

		ztunnel = await node.ztunnel();
	});
	t.true(iptables.outbound.errors['ECONNREFUSED']! > 0 && sidestep.outbound.errors['ECONNREFUSED']! > 0);
	// Both wait for the same ztunnel; when a pod's turn comes is chance.
	t.true(sidestep.outbound.failed / STEERED < 2 * iptables.outbound.failed / REFERENCES + 5);
	t.true(sidestep.inbound.failed < 2 * iptables.inbound.failed + 20);

	const rest = await under(t, node, 'at rest', async () => {});
	for (const {outbound, inbound} of Object.values(rest)) {
		t.like(outbound, {failed: 0, wrong_peer: 0});
		t.like(inbound, {failed: 0, wrong_peer: 0});
	}
});
