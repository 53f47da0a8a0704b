import {existsSync, readFileSync, readdirSync, statSync, mkdirSync} from 'node:fs';
import path from 'node:path';
import test from 'ava';
import {CAPABILITIES} from '../../src/loader/host.js';
import {AMBIENT, NETWORK} from '../helpers/cluster.js';
import {Running, eventually, run} from '../helpers/process.js';
import type {ProxyLine} from '../helpers/world.js';
import {NodeWorld, podman} from './container.js';
import {podTemplate} from './rendered.js';

const SIDECAR = {'sidecar.istio.io/status': '{}'};
const SIDECAR_ID = 1337;
const MEGABYTE = 1e6;

test.beforeEach(t => {
	t.timeout(170_000);
});

test('with what overlay sidecar gives it, the agent finds a pod, captures it, holds another one\'s start, is replaced, and is removed', async t => {
	const node = await NodeWorld.create(t, 'sidecar');
	const {cluster} = node;
	const {world} = cluster;
	cluster.namespace('shop');
	const far = world.pod('far');
	await far.server(`${far.ipv4}:8080`);
	const first = node.start();
	await first.ready();

	// Nothing but what the manifest lists.
	const {securityContext: {capabilities}} = node.template.containers[0];
	const bits = capabilities.add.reduce((sum, name) => sum | (1n << BigInt(CAPABILITIES.get(`CAP_${name}`)!)), 0n);
	for (const set of ['CapPrm', 'CapEff', 'CapBnd']) {
		t.is(BigInt(`0x${first.status(set)}`), bits, set);
	}

	t.is(first.status('Seccomp'), '2', 'a seccomp filter is in force');
	t.regex(readFileSync(`/proc/${first.pid}/mounts`, 'utf8'), /^overlay \/ overlay ro,/m);
	t.is(first.status('Uid').split('\t')[0], '0');

	const web = await cluster.pod('shop/web', {annotations: SIDECAR});
	await first.says(/enrol shop\/web/);
	const proxy = await web.pod.proxy(['--listen', '[::]:15001', '--brief'], {uid: SIDECAR_ID, gid: SIDECAR_ID});
	const connects = () => {
		const {outcome, hello, local} = web.pod.client(`${far.ipv4}:8080`);
		t.is(outcome, 'ok');
		return hello!.peer === local ? 'directly' : 'by the proxy';
	};

	t.is(connects(), 'by the proxy');
	await proxy.until('the proxy knows where the connection was to go', () => proxy.lines<ProxyLine>().some(({original_dst}) => original_dst === `${far.ipv4}:8080`));

	// The plugin, as the agent has put it on the host, is called by a runtime: no process of the pod is there yet.
	const next = world.pod('next');
	cluster.api.put('pods', {
		metadata: {name: 'next', namespace: 'shop', annotations: SIDECAR}, spec: {nodeName: 'node-1', serviceAccountName: 'default', containers: []}, status: {phase: 'Pending'},
	});
	const chain = JSON.parse(readFileSync(path.join(node.hostPath('/etc/cni/net.d'), NETWORK), 'utf8')) as {name: string; plugins: Array<{type: string; socket?: string}>};
	const entry = chain.plugins.at(-1)!;
	t.is(entry.type, 'sidestep-cni');
	t.is(path.dirname(entry.socket!), '/var/run/sidestep');
	const call = Running.start('env', [
		'CNI_COMMAND=ADD', 'CNI_CONTAINERID=c1', `CNI_NETNS=${next.netns}`, 'CNI_IFNAME=eth0', `CNI_PATH=${node.hostPath('/opt/cni/bin')}`, 'CNI_ARGS=K8S_POD_NAMESPACE=shop;K8S_POD_NAME=next',
		path.join(node.hostPath('/opt/cni/bin'), entry.type),
	]);
	call.child.stdin!.end(JSON.stringify({
		cniVersion: '1.0.0', name: chain.name, ...entry, socket: path.join(node.hostPath('/var/run/sidestep'), path.basename(entry.socket!)),
		prevResult: {cniVersion: '1.0.0', interfaces: [{name: 'eth0', sandbox: next.netns}], ips: [{address: `${next.ipv4}/24`, interface: 0}, {address: `${next.ipv6}/64`, interface: 0}]},
	}));
	t.is(await call.ended, 0, `${call.stdout}${call.stderr}${first.running.stderr}`);
	t.deepEqual(cluster.enrolled(), ['shop/next', 'shop/web']);

	// What the guide says to type.
	t.regex(first.exec('status').stdout, /agent: running/);
	t.regex(first.exec('pods', 'shop/web').stdout, /redirected +\d/);
	t.is(first.exec('sockets').code, 0);
	t.regex(first.exec('check').stdout, /capture of IPv4 +ok/);

	podman('kill', '--signal', 'KILL', first.name);
	await first.ended();
	t.is(connects(), 'by the proxy');
	const second = node.start();
	await second.ready();
	t.regex(second.running.stderr, /programs adopted/);
	t.notRegex(second.running.stderr, /enrol|remove|update/);

	t.is(await second.running.stop('SIGTERM'), 0, second.running.stderr);
	for (const {args} of podTemplate('remove').initContainers!) {
		const step = node.start({args});
		t.is(await step.ended(), 0, step.running.stderr);
	}

	t.deepEqual(readdirSync(node.hostPath('/opt/cni/bin')), []);
	t.notRegex(readFileSync(path.join(node.hostPath('/etc/cni/net.d'), NETWORK), 'utf8'), /sidestep/);
	t.is(connects(), 'directly');
	t.deepEqual(readdirSync(path.join(world.bpffs, 'sidestep')), []);
});

test('with what overlay ambient gives it, the agent serves ztunnel\'s socket, and sets sysctls in the pod\'s namespace through /host/proc', async t => {
	const node = await NodeWorld.create(t, 'ambient');
	const {cluster} = node;
	cluster.namespace('shop', AMBIENT);
	cluster.namespace('istio-system', AMBIENT);
	const web = await cluster.pod('shop/web');
	await cluster.pod('istio-system/ztunnel');
	const agent = node.start();
	await agent.ready();
	t.true(statSync(path.join(node.hostPath('/var/run/ztunnel'), 'ztunnel.sock')).isSocket());
	t.deepEqual(cluster.enrolled(), ['shop/web']);
	t.is(web.pod.must('cat', '/proc/sys/net/ipv4/tcp_fwmark_accept').trim(), '1');
	await eventually('the pod is pending, as no ztunnel is there', () => cluster.redirection('shop/web') === 'pending');
	t.is(agent.probe(node.template.containers[0].livenessProbe.httpGet.path).code, 0);
});

for (const capability of podTemplate('ambient').containers[0].securityContext.capabilities.add) {
	test(`without ${capability} the agent does not start, and says so`, async t => {
		const node = await NodeWorld.create(t, 'ambient');
		const agent = node.start({without: capability});
		t.is(await agent.ended(), 1);
		t.regex(agent.running.stderr, new RegExp(`this process lacks .*CAP_${capability}\\b.*: run as root, or give the container these capabilities`));
	});
}

test('on a node without bpffs the agent does not start, as pins would end with its container', async t => {
	const node = await NodeWorld.create(t, 'ambient');
	const plain = path.join(node.cluster.world.directory, 'plain');
	mkdirSync(plain);
	const agent = node.start({hostPaths: {'/sys/fs/bpf': plain}});
	t.is(await agent.ended(), 1);
	t.regex(agent.running.stderr, /no bpf file system at \/sys\/fs\/bpf, and one that is mounted here would end with this container/);
	t.deepEqual(readdirSync(plain), []);
});

test('the image is small, and has no shell and no setuid program', t => {
	const root = podman('image', 'mount', 'localhost/sidestep:test').stdout.trim();
	t.teardown(() => {
		podman('image', 'unmount', 'localhost/sidestep:test');
	});
	const files = run('find', [root, '-type', 'f', '-printf', '%m %s %P\n']).stdout.trim().split('\n').map(line => {
		const [mode, size, ...name] = line.split(' ');
		return {mode: Number.parseInt(mode!, 8), size: Number(size), name: name.join(' ')};
	});
	t.deepEqual(files.filter(({mode}) => mode & 0o6000), []);
	t.deepEqual(files.filter(({name, mode}) => mode & 0o111 && /^(?:usr\/)?s?bin\//.test(name)).map(({name}) => name), ['usr/bin/node']);
	t.deepEqual(files.filter(({name}) => /(?:^|\/)(?:test|src\/.*\.ts|typescript|cmake-js)(?:\/|$)/.test(name) && name.startsWith('opt/sidestep/dist')), []);
	t.false(existsSync(path.join(root, 'opt/sidestep/node_modules/typescript')));
	const size = files.reduce((sum, file) => sum + file.size, 0) / MEGABYTE;
	t.log(`${size.toFixed(0)} MB`);
	t.true(size < 140, `${size} MB`);
});
