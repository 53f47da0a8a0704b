/** Pods of a cluster: found, captured, followed and forgotten, as the API server and the kernel say. */
import test from 'ava';
import {AMBIENT, CGROUP_DRIVERS, Cluster, NODE, type CgroupDriver} from '../helpers/cluster.js';
import {eventually, must} from '../helpers/process.js';

for (const driver of Object.keys(CGROUP_DRIVERS) as readonly CgroupDriver[]) {
	test(`a pod is found by its uid in cgroups as ${driver} makes them`, async t => {
		const cluster = await Cluster.create(t);
		cluster.namespace('shop');
		const agent = await cluster.agent();
		await cluster.pod('shop/web', {labels: AMBIENT, driver});
		await agent.says(/enrol shop\/web/);
		t.deepEqual(cluster.enrolled(), ['shop/web']);
	});
}

test('labels of pod and namespace decide, and may change at any time', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	cluster.namespace('other');
	cluster.namespace('kube-system', AMBIENT);
	const web = await cluster.pod('shop/web');
	const none = await cluster.pod('shop/none', {labels: {'istio.io/dataplane-mode': 'none'}});
	const lone = await cluster.pod('other/lone');
	await cluster.pod('kube-system/dns');
	const agent = await cluster.agent();
	t.deepEqual(cluster.enrolled(), ['shop/web']);
	cluster.put(none, {});
	await agent.says(/enrol shop\/none/);
	cluster.put(lone, {labels: AMBIENT});
	await agent.says(/enrol other\/lone/);
	cluster.put(lone, {annotations: {'sidecar.istio.io/status': '{}'}});
	await agent.says(/update other\/lone/);
	t.is(cluster.world.json<ReadonlyArray<{mode: string}>>('pods', 'other/lone')[0]!.mode, 'sidecar');
	const before = agent.running.stderr.length;
	cluster.namespace('shop');
	await agent.says(/remove shop\/web[^]*remove shop\/none|remove shop\/none[^]*remove shop\/web/, before);
	t.deepEqual(cluster.enrolled(), ['other/lone']);
	cluster.put(web, {labels: AMBIENT, phase: 'Succeeded'});
	cluster.api.delete('pods', 'other/lone');
	await agent.says(/remove other\/lone/);
	t.deepEqual(cluster.enrolled(), []);
});

test('containers that end and start again keep the pod captured; the oldest process whose namespace has the pod\'s address counts', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const agent = await cluster.agent(['--resync', '200']);
	const web = await cluster.pod('shop/web');
	await agent.says(/enrol shop\/web/);
	// What a container unshares by itself is not the pod's.
	const inner = cluster.world.pod('inner');
	await cluster.container({...web, pod: inner});
	const second = await cluster.container(web);
	await web.first!.stop('SIGKILL');
	await cluster.container(web);
	await second.stop('SIGKILL');
	const before = agent.running.stderr.length;
	await agent.rounds(3);
	t.notRegex(agent.running.stderr.slice(before), /remove|failed|not found/);
	t.deepEqual(cluster.enrolled(), ['shop/web']);
	const [row] = cluster.world.json<ReadonlyArray<{addresses: readonly string[]}>>('pods', 'shop/web');
	t.true(JSON.stringify(row).includes(web.pod.ipv4));
});

test('the host\'s namespace and hostNetwork pods are never captured', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const agent = await cluster.agent(['--resync', '200']);
	await cluster.pod('shop/host', {hostNetwork: true});
	const lies = {key: 'shop/lies', uid: '11111111-2222-4333-8444-555555555555', pod: cluster.world.node};
	await cluster.hostProcess(lies.uid);
	cluster.api.put('pods', {metadata: {name: 'lies', namespace: 'shop', uid: lies.uid}, spec: {nodeName: NODE}, status: {phase: 'Running', podIPs: [{ip: '127.0.0.1'}]}});
	await agent.says(/pod shop\/lies: none of its 1 processes has a network namespace with its address 127\.0\.0\.1/);
	await agent.says(/pod shop\/host is not captured: it has the node's network namespace/);
	t.deepEqual(cluster.enrolled(), []);
	t.is((await agent.get('/readyz')).status, 200, 'a pod that fails is no reason to stop an upgrade');
});

test('a pod that comes back under its name with another uid and namespace is another pod', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const agent = await cluster.agent();
	const first = await cluster.pod('shop/web-0');
	await agent.says(/enrol shop\/web-0/);
	const again = {...first, uid: '99999999-2222-4333-8444-555555555555', pod: cluster.world.pod('again')};
	await cluster.container(again);
	cluster.api.delete('pods', first.key);
	cluster.put(again);
	await eventually('the kernel has the new one', () => cluster.world.json<ReadonlyArray<{netns?: string}>>('pods', 'shop/web-0').some(row => JSON.stringify(row).includes(again.pod.ipv4)));
	t.deepEqual(cluster.enrolled(), ['shop/web-0']);
});

test('a pod that ends as it was asked to is no failure', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop');
	const annotations = {'sidecar.istio.io/status': '{}'};
	const agent = await cluster.agent(['--resync', '200']);
	const web = await cluster.pod('shop/web', {annotations});
	await agent.says(/enrol shop\/web/);
	cluster.put(web, {annotations, deletionTimestamp: new Date().toISOString()});
	await agent.rounds(3);
	t.deepEqual(cluster.enrolled(), ['shop/web'], 'it may go on for as long as its grace period');
	await web.first!.stop('SIGKILL');
	must('ip', 'netns', 'del', web.pod.netnsName);
	must('ip', 'netns', 'add', web.pod.netnsName);
	await eventually('it is not captured any more', () => cluster.enrolled().length === 0);
	await agent.rounds(5);
	t.deepEqual(cluster.api.events, []);
	t.notRegex(agent.running.stderr, /no process/);
});

test('/readyz tells what the API server does wrong', async t => {
	const cluster = await Cluster.create(t);
	const agent = await cluster.agent();
	cluster.api.behave({status: 503});
	cluster.api.endWatches();
	await eventually('it is not ready', async () => {
		const {status, body} = await agent.get('/readyz');
		return status === 503 && /following \/api\/v1\/(pods|namespaces): .*503/.test(body);
	});
	cluster.api.behave();
	await agent.ready();
	t.deepEqual(cluster.enrolled(), []);
});

test('without ztunnel a captured pod is pending, and what cannot be honoured is an event', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	await cluster.agent();
	await cluster.pod('shop/web');
	await cluster.pod('shop/wrong', {annotations: {'ambient.istio.io/dns-capture': 'perhaps'}});
	await eventually('the annotation says pending', () => cluster.redirection('shop/web') === 'pending');
	await eventually('an event tells of the annotation', () => cluster.api.events.some(event => JSON.stringify(event).includes('dns-capture') && (event['reason'] === 'CaptureRefused')));
	t.deepEqual(cluster.enrolled(), ['shop/web']);
});
