/** A pod's start, as the CNI plugin, the kernel, ztunnel and the API server see it. */
import {setTimeout as sleep} from 'node:timers/promises';
import test from 'ava';
import {AMBIENT, Cluster, NODE, type ClusterPod} from '../helpers/cluster.js';
import {eventually, type Running} from '../helpers/process.js';

/** Its sandbox is made, and nothing runs in it: the API has no addresses. */
function sandbox(cluster: Cluster, key: string, options: {readonly labels?: Record<string, string>; readonly annotations?: Record<string, string>} = {}): ClusterPod {
	const pod = {key, uid: crypto.randomUUID(), pod: cluster.world.pod(key.replace('/', '-'))};
	cluster.put(pod, {ips: [], phase: 'Pending', ...options});
	return pod;
}

const told = (ztunnel: Running) => ztunnel.lines<{zds?: string; uid?: string}>().filter(line => line.zds !== undefined).map(({zds, uid}) => `${zds} ${uid ?? ''}`.trim());

test('rules, then ztunnel, then its answer: the pod starts, is captured from its first connection, and is said to be enabled', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const far = cluster.world.pod('far');
	await far.server(`${far.ipv4}:8080`);
	const agent = await cluster.agent(['--cni']);
	const web = sandbox(cluster, 'shop/web');
	const add = cluster.cni('ADD', web);
	await agent.says(/enrol shop\/web/);
	let isDone = false;
	void add.then(() => {
		isDone = true;
	});
	await sleep(1500);
	t.false(isDone, 'no ztunnel yet');
	t.is(web.pod.client(`${far.ipv4}:8080`).outcome, 'ECONNREFUSED', 'captured, and nobody there: refused');
	const ztunnel = cluster.ztunnel();
	const {code, stdout, stderr} = await add;
	t.is(code, 0, stdout + stderr);
	const {outcome, peer} = web.pod.client(`${far.ipv4}:8080`);
	t.deepEqual([outcome, peer], ['ok', `${far.ipv4}:8080`]);
	await eventually('the annotation says enabled', () => cluster.redirection('shop/web') === 'enabled');
	t.is((await cluster.cni('CHECK', web)).code, 0);
	await eventually('ztunnel has told of it', () => told(ztunnel).includes(`add ${web.uid}`));
	t.is((await cluster.cni('DEL', web)).code, 0);
	cluster.api.delete('pods', 'shop/web');
	await eventually('ztunnel is told', () => told(ztunnel).includes(`delete ${web.uid}`));
	t.deepEqual(cluster.enrolled(), []);
});

test('pods that are not captured start at once, and those whose annotations cannot be honoured do not start', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	cluster.namespace('plain');
	await cluster.agent(['--cni']);
	t.is((await cluster.cni('ADD', sandbox(cluster, 'plain/web'))).code, 0);
	const sidecar = sandbox(cluster, 'plain/sidecar', {annotations: {'sidecar.istio.io/status': '{}'}});
	t.is((await cluster.cni('ADD', sidecar)).code, 0, 'it needs no ztunnel');
	const {code, error} = await cluster.cni('ADD', sandbox(cluster, 'shop/wrong', {annotations: {'ambient.istio.io/dns-capture': 'perhaps'}}));
	t.not(code, 0);
	t.regex(`${error?.msg} ${error?.details}`, /annotation ambient\.istio\.io\/dns-capture/);
	const stranger = {key: 'shop/nobody', uid: 'f00', pod: cluster.world.pod('nobody')};
	const unknown = await cluster.cni('ADD', stranger, {timeoutSeconds: 3});
	t.not(unknown.code, 0);
	t.deepEqual(cluster.enrolled(), ['plain/sidecar']);
});

test('a ztunnel that refuses the pod: the pod does not start, and everybody is told why', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	await cluster.agent(['--cni']);
	cluster.ztunnel(['--nack', 'no more threads']);
	const {code, error} = await cluster.cni('ADD', sandbox(cluster, 'shop/web'), {timeoutSeconds: 10});
	t.not(code, 0);
	t.regex(`${error?.msg} ${error?.details}`, /no more threads/);
	await eventually('the annotation says pending', () => cluster.redirection('shop/web') === 'pending');
	await eventually('an event', () => cluster.api.events.some(event => JSON.stringify(event).includes('no more threads')));
});

test('an agent that is killed while a pod waits: the next one lets it start, captured; and finds it again later though no process of it runs', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const first = await cluster.agent(['--cni']);
	const web = sandbox(cluster, 'shop/web');
	const add = cluster.cni('ADD', web);
	await first.says(/enrol shop\/web/);
	await first.running.stop('SIGKILL');
	cluster.ztunnel();
	await sleep(500);
	const second = await cluster.agent(['--cni']);
	t.is((await add).code, 0);
	t.deepEqual(cluster.enrolled(), ['shop/web']);
	await second.running.stop('SIGTERM');
	// The kubelet reports the addresses; still only the sandbox is there.
	cluster.put(web);
	const third = await cluster.agent(['--cni', '--resync', '200']);
	await third.rounds(3);
	t.deepEqual(cluster.enrolled(), ['shop/web']);
	await eventually('still enabled', () => cluster.redirection('shop/web') === 'enabled');
	t.notRegex(third.running.stderr, /remove|enrol|no process/);
});

test('namespaces are not heard of any more: a pod of one that is captured meanwhile does not start uncaptured', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop');
	await cluster.agent(['--cni']);
	cluster.api.behave({event: 'half', applies: ({path}) => path === '/api/v1/namespaces'});
	cluster.namespace('shop', AMBIENT);
	const {code, error} = await cluster.cni('ADD', sandbox(cluster, 'shop/web'), {timeoutSeconds: 10});
	t.not(code, 0);
	t.regex(`${error?.msg} ${error?.details}`, /has not heard yet that it is to be captured/);
});

test('an agent with another node\'s name: pods do not start, and the reason names both nodes', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	await cluster.agent(['--cni']);
	const web = sandbox(cluster, 'shop/web');
	cluster.put(web, {ips: [], phase: 'Pending', nodeName: 'node-2'});
	const {code, error} = await cluster.cni('ADD', web, {timeoutSeconds: 10});
	t.not(code, 0);
	t.regex(`${error?.msg} ${error?.details}`, /node node-2 .* node-1/);
});

test('no agent: the pod does not start, and the reason says what to look at', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const {code, error} = await cluster.cni('ADD', sandbox(cluster, 'shop/web'), {timeoutSeconds: 2});
	t.not(code, 0);
	t.regex(`${error?.msg} ${error?.details}`, /agent/);
});

test('ztunnel that comes back is told of every pod again, and pods of a node that restarted its agent stay enabled', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const pods = [await cluster.pod('shop/a'), await cluster.pod('shop/b')];
	const agent = await cluster.agent();
	const first = cluster.ztunnel();
	await eventually('both enabled', () => pods.every(({key}) => cluster.redirection(key) === 'enabled'));
	await first.stop('SIGKILL');
	const second = cluster.ztunnel();
	await eventually('told again', () => pods.every(({uid}) => told(second).includes(`add ${uid}`)));
	await agent.running.stop('SIGKILL');
	await cluster.agent();
	await eventually('the snapshot comes again', () => told(second).filter(line => line === 'snapshot').length === 2);
	t.true(pods.every(({key}) => cluster.redirection(key) === 'enabled'));
	t.is(cluster.object('shop/a')!['spec'] && (cluster.object('shop/a')!['spec'] as {nodeName: string}).nodeName, NODE);
});

test('a sandbox that is replaced while the API still has the old one\'s addresses: the pod starts again; that the old one is taken away late, does not touch the new one', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const agent = await cluster.agent(['--cni', '--resync', '200']);
	const ztunnel = cluster.ztunnel();
	const first = sandbox(cluster, 'shop/web');
	t.is((await cluster.cni('ADD', first, {containerId: 'first'})).code, 0);
	cluster.put(first);
	await eventually('enabled', () => cluster.redirection('shop/web') === 'enabled');
	t.is((await cluster.cni('DEL', first, {containerId: 'first'})).code, 0);
	const again = {...first, pod: cluster.world.pod('again')};
	const {code, stdout} = await cluster.cni('ADD', again, {containerId: 'second', timeoutSeconds: 10});
	t.is(code, 0, stdout);
	const ips = () => cluster.world.json<ReadonlyArray<{ips: string}>>('pods').map(pod => pod.ips);
	t.deepEqual(ips(), [`${again.pod.ipv4},${again.pod.ipv6}`]);
	const before = agent.running.stderr.length;
	t.is((await cluster.cni('DEL', first, {containerId: 'first'})).code, 0);
	await agent.rounds(3);
	t.deepEqual(ips(), [`${again.pod.ipv4},${again.pod.ipv6}`]);
	cluster.put(again);
	await agent.rounds(3);
	t.notRegex(agent.running.stderr.slice(before), /pod shop\/web|remove/);
	await eventually('enabled again', () => cluster.redirection('shop/web') === 'enabled');
	await eventually('ztunnel has the new namespace', () => again.pod.must('ss', '-Hltn').includes(':15001'));
	t.is(told(ztunnel).filter(line => line === `add ${first.uid}`).length, 2);
});

test('a pod that takes over the name of one that was deleted by force, and that the agent has not heard of: it is the one that is captured', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop');
	const annotations = {'sidecar.istio.io/status': '{}'};
	const agent = await cluster.agent(['--cni']);
	const first = await cluster.pod('shop/web-0', {annotations});
	await agent.says(/enrol shop\/web-0/);
	// Events stop in the middle of one; what is asked for is answered.
	cluster.api.behave({event: 'half'});
	cluster.api.delete('pods', first.key);
	const second = {...first, uid: crypto.randomUUID(), pod: cluster.world.pod('second')};
	cluster.put(second, {ips: [], phase: 'Pending', annotations});
	const {code, stdout} = await cluster.cni('ADD', second);
	t.is(code, 0, stdout);
	t.deepEqual(cluster.world.json<ReadonlyArray<{ips: string}>>('pods').map(({ips}) => ips), [`${second.pod.ipv4},${second.pod.ipv6}`]);
});

test('a static pod, whose uid the kubelet takes from its file and the API from its mirror: it starts captured, is found again by its processes, and goes', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('shop', AMBIENT);
	const agent = await cluster.agent(['--cni']);
	cluster.ztunnel(['--brief']);
	const hash = '0123456789abcdef0123456789abcdef';
	const annotations = {'kubernetes.io/config.hash': hash, 'kubernetes.io/config.mirror': hash};
	const mirror = sandbox(cluster, 'shop/static-node-1', {annotations});
	const kubelets = {...mirror, uid: hash};
	const {code, stdout} = await cluster.cni('ADD', kubelets);
	t.is(code, 0, stdout);
	t.deepEqual(cluster.enrolled(), [mirror.key]);
	await cluster.container(kubelets);
	cluster.put(mirror, {annotations});
	await agent.running.stop('SIGKILL');
	t.is(cluster.world.sidestep('unload').code, 0);
	const second = await cluster.agent(['--cni']);
	await second.says(/enrol shop\/static-node-1/);
	const before = second.running.stderr.length;
	t.is((await cluster.cni('DEL', kubelets)).code, 0);
	cluster.api.delete('pods', mirror.key);
	await second.says(/remove shop\/static-node-1/, before);
	t.deepEqual(cluster.enrolled(), []);
});

test('a sidecar\'s pod of whose addresses nobody knows yet: it does not start uncaptured', async t => {
	const cluster = await Cluster.create(t);
	cluster.namespace('plain');
	await cluster.agent(['--cni']);
	const sidecar = sandbox(cluster, 'plain/sidecar', {annotations: {'sidecar.istio.io/status': '{}'}});
	const {code, stderr} = await cluster.cni('ADD', {...sidecar, pod: Object.assign(Object.create(sidecar.pod) as typeof sidecar.pod, {ipv4: '', ipv6: ''})}, {timeoutSeconds: 3});
	t.not(code, 0);
	t.regex(stderr, /not captured yet: its addresses are not known/);
	t.deepEqual(cluster.enrolled(), []);
});
