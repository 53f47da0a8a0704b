/**
ztunnel is replaced while 200 pods are busy: what fails, beside pods under Istio's iptables rules that the same two ztunnels serve at the same time.
*/
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {native} from '../../src/native.js';
import {ZdsServer} from '../../src/zds/server.js';
import {ambientRules} from '../helpers/istio-rules.js';
import {eventually, type Running} from '../helpers/process.js';
import {World, type ManyResult, type Pod} from '../helpers/world.js';

const STEERED = 180;
const REFERENCES = 20;
/** Of each kind, these also have an application that is connected to. */
const SERVERS = 20;
const PORT = 8080;

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
	await far.server(`[::]:${PORT}`);
	const steered = Array.from({length: STEERED}, (_, index) => world.pod(`s${index}`));
	const references = Array.from({length: REFERENCES}, (_, index) => world.pod(`r${index}`));
	for (const pod of references) {
		ambientRules(pod);
	}

	for (const pod of [...steered.slice(0, SERVERS), ...references.slice(0, SERVERS)]) {
		await pod.server(`[::]:${PORT}`);
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
	const pods = [...steered, ...references];
	for (const pod of pods) {
		server.put({uid: pod.name, name: pod.name, namespace: 'test', serviceAccount: 'default', openNetns: () => native.openNetns(pod.netns)});
	}

	return {
		world, far, server, kinds: {sidestep: steered, iptables: references},
		async ztunnel() {
			const running = world.node.start([world.program('ztunnel'), '--zds', socketPath, '--brief']);
			await eventually('it has its snapshot', () => server.connections.some(({pid, isSnapshotDone}) => pid === running.child.pid && isSnapshotDone), 60_000);
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

const ENDLESS = ['--count', '1000000000'];

function start({kinds, far}: Node): Readonly<Record<Kind, Load>> {
	const load = (pods: readonly Pod[]): Load => ({
		outbound: pods.map(pod => pod.startClients([`${far.ipv4}:${PORT}`], ENDLESS)),
		inbound: [far.startClients(pods.slice(0, SERVERS).map(({ipv4}) => `${ipv4}:${PORT}`), [...ENDLESS, '--parallel', '8'])],
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
	await sleep(1500);
	await replace();
	await sleep(1500);
	const totals = {} as Record<Kind, Record<keyof Load, ManyResult>>;
	for (const kind of ['sidestep', 'iptables'] as const) {
		totals[kind] = {outbound: await stop(loads[kind].outbound), inbound: await stop(loads[kind].inbound)};
		t.log(`${title}, ${kind}, ${node.kinds[kind].length} pods: ${JSON.stringify(totals[kind])}`);
	}

	return totals;
}

test.serial('ztunnel is replaced under the load of 200 pods, as under iptables', async t => {
	const node = await setUp(t);
	let ztunnel = await node.ztunnel();
	await under(t, node, 'drained', async () => {
		const next = await node.ztunnel();
		await ztunnel.stop('SIGTERM');
		ztunnel = next;
	});
	await under(t, node, 'killed, the next one is there', async () => {
		const next = await node.ztunnel();
		await ztunnel.stop('SIGKILL');
		ztunnel = next;
	});
	await under(t, node, 'killed, then the next one comes', async () => {
		await ztunnel.stop('SIGKILL');
		ztunnel = await node.ztunnel();
	});
	const after = await under(t, node, 'at rest', async () => {});
	t.is(after.sidestep.outbound.failed + after.sidestep.inbound.failed, 0);
});
