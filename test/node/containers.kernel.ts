/**
Real containers whose start the real agent holds: podman with its CNI backend, Debian's bridge and host-local, and the plugin that the agent put into their chain. The agent runs among
podman's processes and mounts, as on a node: the paths of namespaces are its own, and process 1 has the node's.
*/
import {randomUUID} from 'node:crypto';
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {BUILT_PLUGIN} from '../../src/cni/command.js';
import {ContainerHost, type ContainerHostOptions} from '../cni/container-host.js';
import {AMBIENT, Cluster, NODE} from '../helpers/cluster.js';
import {eventually, type Running} from '../helpers/process.js';
import {startNodeVersion} from '../helpers/versions.js';
import {type Agent, type ZtunnelLine} from '../helpers/world.js';
import {makePod} from '../kubernetes/fake-server.js';

const KEY = 'shop/web';

class Node {
	private constructor(readonly cluster: Cluster, readonly host: ContainerHost, readonly server: Running, readonly address: string) {}

	static async create(t: ExecutionContext, options: ContainerHostOptions = {}): Promise<Node> {
		const cluster = await Cluster.create(t);
		cluster.namespace('shop', AMBIENT);
		const far = cluster.world.pod('far');
		const address = `${far.ipv4}:8080`;
		const server = await far.server(address);
		const host = await ContainerHost.create(cluster.world, {socketPath: cluster.cniSocket, ...options});
		cluster.enter = host.enter;
		return new Node(cluster, host, server, address);
	}

	/** Ready, with its plugin in podman's chain. */
	async agent(): Promise<Agent> {
		const {cluster, host} = this;
		return cluster.agent(['--cni', '--node-netns', '/proc/1/ns/net', '--cni-bin', host.path('bin'), '--cni-conf', host.path('net.d')]);
	}

	/** The agent of the next version, ready. */
	async nextVersion(): Promise<Agent> {
		const {cluster, host} = this;
		return startNodeVersion(cluster, 3, {cni: {binary: BUILT_PLUGIN, binDir: host.path('bin'), confDir: host.path('net.d'), socketPath: host.socketPath, timeoutSeconds: 60}});
	}

	/** Its first command connects, five times without a pause. The API knows it, without an address. */
	pod({annotations}: {readonly annotations?: Record<string, string>} = {}): {readonly uid: string; readonly running: Running} {
		const uid = randomUUID();
		this.cluster.api.put('pods', makePod(KEY, {uid, nodeName: NODE, phase: 'Pending', ...(annotations ? {annotations} : {})}));
		return {uid, running: this.host.pod({key: KEY, uid}, `for i in 1 2 3 4 5; do echo hello | nc ${this.address.replace(':', ' ')} || exit 1; done`)};
	}
}

function checkCaptured(t: ExecutionContext, ztunnel: Running, address: string): void {
	const lines = ztunnel.lines<ZtunnelLine>().filter(line => 'listener' in line);
	t.deepEqual(lines.map(({listener, original_dst: original}) => [listener, original]), Array.from({length: 5}, () => [15_001, address]));
	t.true(lines.every(({peer}) => /^\[::ffff:10\.77\.0\.1\d\d]:/.test(peer)), JSON.stringify(lines));
}

test('a container is held until ztunnel serves its namespace; its first connection is captured; at its end the pod is forgotten', async t => {
	const node = await Node.create(t);
	const {cluster, address} = node;
	const agent = await node.agent();
	const {uid, running} = node.pod();
	await agent.says(/enrol shop\/web/);
	await sleep(1500);
	t.false(running.hasEnded, running.stderr);
	t.is(cluster.redirection(KEY), 'pending');
	t.deepEqual(cluster.enrolled(), [KEY]);
	const ztunnel = cluster.ztunnel();
	t.is(await running.ended, 0, running.stderr);
	checkCaptured(t, ztunnel, address);
	await eventually('DEL was heard', async () => (await agent.get('/metrics')).body.includes('sidestep_cni_calls_total{command="del",result="ok"} 1'));
	await eventually('its end took it away', () => cluster.enrolled().length === 0);
	cluster.api.delete('pods', KEY);
	await eventually('ztunnel is told', () => ztunnel.lines<{zds?: string; uid?: string}>().some(line => line.zds === 'delete' && line.uid === uid));
});

for (const [how, signal, next, what] of [
	['stops', 'SIGTERM', async (node: Node) => node.agent(), /programs adopted/],
	['is killed', 'SIGKILL', async (node: Node) => node.agent(), /programs adopted/],
	['is upgraded', 'SIGTERM', async (node: Node) => node.nextVersion(), /programs upgraded/],
] as const) {
	test(`an agent that ${how} while a container is held: the next one lets it start, captured`, async t => {
		const node = await Node.create(t);
		const first = await node.agent();
		const {running} = node.pod();
		await first.says(/enrol shop\/web/);
		await node.host.stop(first.running, signal);
		const ztunnel = node.cluster.ztunnel();
		await sleep(700);
		t.false(running.hasEnded, running.stderr);
		t.notRegex(node.server.stdout, /hello/);
		const second = await next(node);
		t.regex(second.running.stderr, what);
		t.is(await running.ended, 0, running.stderr);
		checkCaptured(t, ztunnel, node.address);
	});
}

test('no agent: the container does not start, and podman tells what the plugin said', async t => {
	const node = await Node.create(t, {timeoutSeconds: 2});
	const {running} = node.pod();
	t.not(await running.ended, 0);
	t.regex(running.stderr, /the sidestep agent did not let the pod start in 2 s .*without it the pod would start uncaptured/);
	t.notRegex(node.server.stdout, /hello/);
});

test('an annotation that cannot be honoured: the container does not start, and podman tells which', async t => {
	const node = await Node.create(t);
	await node.agent();
	const {running} = node.pod({annotations: {'ambient.istio.io/dns-capture': 'perhaps'}});
	t.not(await running.ended, 0);
	t.regex(running.stderr, /the sidestep agent refused: .*ambient\.istio\.io\/dns-capture/);
	t.notRegex(node.server.stdout, /hello/);
	t.deepEqual(node.cluster.enrolled(), []);
});
