/** Bad input: each a clear error, nothing changed, nothing half-attached. */
import {once} from 'node:events';
import {existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync} from 'node:fs';
import {createServer, type AddressInfo} from 'node:net';
import path from 'node:path';
import test from 'ava';
import {native} from '../../src/native.js';
import {podEntry} from '../helpers/capture.js';
import {Cluster, NETWORK} from '../helpers/cluster.js';
import {eventually, run} from '../helpers/process.js';
import {CLI, World, type Agent} from '../helpers/world.js';

const nothingIsLoaded = (world: World) => !existsSync(`${world.bpffs}/sidestep`) || readdirSync(`${world.bpffs}/sidestep`).length === 0;

/** Programs of ours on the world's cgroup. */
function attached(world: World): number {
	return [10, 11, 29, 30, 3, 21].flatMap(type => native.cgroupPrograms(world.cgroup, type)).length;
}

async function fails(agent: Agent): Promise<{code: number | null; stderr: string}> {
	const code = await agent.running.ended;
	return {code, stderr: agent.running.stderr};
}

test('a malformed pods file: the agent does not start', async t => {
	const world = World.create(t);
	writeFileSync(world.podsFile, 'pods:\n  - name: [\n');
	const {code, stderr} = await fails(world.startAgent());
	t.is(code, 2);
	t.regex(stderr, /pods\.yaml:3:\d+: /);
	writeFileSync(world.podsFile, 'pods: [{name: a, netns: /x, proxy: {port: 70000}}]');
	const second = await fails(world.startAgent());
	t.is(second.code, 2);
	t.regex(second.stderr, /pods\.yaml: pods\[0\]\.proxy\.port: expected an integer from 1 to 65535, got 70000/);
	t.true(nothingIsLoaded(world));
	t.is(attached(world), 0);
});

test('a pods file that is missing, a directory or a fifo: the agent does not start', async t => {
	const world = World.create(t);
	for (const [make, message] of [[[], /ENOENT/], [['mkdir'], /not a regular file/], [['mkfifo'], /not a regular file/]] as const) {
		for (const command of make) {
			run('rm', ['-rf', world.podsFile]);
			run(command, [world.podsFile]);
		}

		const {code, stderr} = await fails(world.startAgent());
		t.is(code, 2);
		t.regex(stderr, message);
	}

	t.true(nothingIsLoaded(world));
});

test('an API server that cannot be, a socket that is taken, a /proc without processes: the agent does not start, and leaves nothing behind', async t => {
	const cluster = await Cluster.create(t);
	const {world} = cluster;
	const other = createServer().listen(cluster.zdsSocket);
	await once(other, 'listening');
	t.teardown(() => {
		other.close();
	});
	for (const [extra, message] of [
		[['--api-server', 'ftp://nowhere'], /ftp:\/\/nowhere/], [[], /ztunnel\.sock/], [['--proc', world.directory], /shows no process 1/],
	] as const) {
		const {code, stderr} = await fails(cluster.startAgent(extra));
		t.true(code === 1 || code === 2, stderr);
		t.regex(stderr, message);
		t.true(nothingIsLoaded(world));
		t.is(attached(world), 0);
	}
});

test('status and unload tell of a CNI plugin that would hold every pod\'s start', async t => {
	const cluster = await Cluster.create(t);
	const {world} = cluster;
	const agent = await cluster.agent(['--cni']);
	const network = path.join(world.directory, 'cni-conf', NETWORK);
	await eventually('it is installed', () => readFileSync(network, 'utf8').includes('sidestep-cni'));
	await agent.running.stop('SIGTERM');
	const conf = ['--cni-conf', path.dirname(network)];
	const status = world.sidestep('status', ...conf);
	t.true(status.stdout.includes(`cniPlugin: in ${network}: no pod starts without an agent`), status.stdout);
	const {stderr} = world.sidestep('unload', ...conf);
	t.true(stderr.includes(`the CNI plugin stays in ${network}`), stderr);
	t.regex(stderr, /sidestep cni uninstall/);
});

test('a pods file that is replaced by rename, or through a symbolic link as in a mounted ConfigMap, is read again', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	const write = (directory: string, pods: readonly object[]) => {
		mkdirSync(path.join(world.directory, directory));
		writeFileSync(path.join(world.directory, directory, 'pods.yaml'), JSON.stringify({pods}));
	};

	write('one', []);
	write('two', [podEntry(pod)]);
	const link = (target: string, name: string) => run('ln', ['-sfT', target, path.join(world.directory, name)]);
	link('one', '..data');
	link('..data/pods.yaml', 'pods.yaml');
	const agent = world.startAgent();
	await agent.ready();
	link('two', '..tmp');
	run('mv', ['-T', path.join(world.directory, '..tmp'), path.join(world.directory, '..data')]);
	await agent.says(/enrol test\/pod/);
	run('rm', [world.podsFile]);
	await agent.says(/cannot be read .*the last good pods file stays in force/);
	t.is(world.json<unknown[]>('pods').length, 1);
	writeFileSync(path.join(world.directory, 'new'), 'pods: []');
	run('mv', [path.join(world.directory, 'new'), world.podsFile]);
	await agent.says(/remove test\/pod/);
	t.pass();
});

test('a pods file that becomes malformed: the last good one stays in force', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	const agent = await world.agent([podEntry(pod)]);
	const before = world.json('map', 'dump', 'pods');
	writeFileSync(world.podsFile, '{');
	await agent.says(/pods\.yaml:1:\d+: .*\(the last good pods file stays in force\)/);
	t.deepEqual(world.json('map', 'dump', 'pods'), before);
	t.is((await agent.get('/readyz')).status, 503);
	world.writePods([podEntry(pod)]);
	await agent.ready();
});

test('namespaces that cannot be enrolled are refused one by one, and the others are served', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	const twin = world.pod('twin');
	const file = path.join(world.directory, 'file');
	writeFileSync(file, '');
	const agent = await world.agent([podEntry(pod)]);
	const before = world.json('map', 'dump', 'pods');
	world.writePods([
		podEntry(pod),
		{...podEntry(pod), name: 'missing', netns: '/run/netns/never-there'},
		{...podEntry(pod), name: 'no-process', netns: undefined, pid: 4_194_304},
		{...podEntry(pod), name: 'host', netns: '/proc/self/ns/net'},
		{...podEntry(pod), name: 'file', netns: file},
		{...podEntry(pod), name: 'other-kind', netns: '/proc/self/ns/mnt'},
		{...podEntry(twin), name: 'twin-a'},
		{...podEntry(twin), name: 'twin-b'},
		{...podEntry(twin), name: 'no-cgroup', netns: pod.netns, exempt: {cgroups: ['/sys/fs/cgroup/never-there']}},
	]);
	await agent.says(/no-cgroup/);
	for (const message of [
		/pod missing: its network namespace \/run\/netns\/never-there does not exist: start the pod/,
		/pod no-process: its process 4194304 does not exist/,
		/pod host: its network namespace is the host's own, which is never captured/,
		/pod file: .* is not a network namespace/,
		/pod other-kind: .* is not a network namespace/,
		/pod twin-a: it has the same network namespace as pod twin-b/,
		/pod twin-b: it has the same network namespace as pod twin-a/,
		/pod no-cgroup: its exempt cgroup \/sys\/fs\/cgroup\/never-there cannot be used \(.*ENOENT/,
	]) {
		t.regex(agent.running.stderr, message);
	}

	t.deepEqual(world.json('map', 'dump', 'pods'), before, 'the good pod stays, no other came');
});

test('an error never takes an enrolled pod out of capture', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	const agent = await world.agent([podEntry(pod)]);
	const before = world.json('map', 'dump', 'pods');
	world.writePods([{...podEntry(pod), ips: ['10.9.9.9']}]);
	await agent.says(/pod test\/pod: its namespace does not have the address 10\.9\.9\.9/);
	t.deepEqual(world.json('map', 'dump', 'pods'), before);
});

test('a proxy inside the pod with nothing exempt would capture itself: refused', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	world.writePods([{...podEntry(pod), exempt: {}}]);
	const agent = world.startAgent();
	await agent.says(/its proxy is inside the pod and nothing is exempt/);
	t.deepEqual(world.json('map', 'dump', 'pods'), []);
});

test('without privilege the agent says which capability is missing', t => {
	const world = World.create(t);
	world.writePods([]);
	const {code, stderr} = run('setpriv', ['--bounding-set', '-all', '--inh-caps', '-all', process.execPath, CLI, 'run', '--pods-file', world.podsFile, '--bpffs', world.bpffs, '--cgroup', world.cgroup]);
	t.is(code, 1);
	t.regex(stderr, /this process lacks .*CAP_BPF.*: run as root, or give the container these capabilities/);
	t.true(nothingIsLoaded(world));
});

test('the capabilities that ARCHITECTURE.md lists are enough, and each is needed', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	const needed = ['bpf', 'perfmon', 'net_admin', 'sys_admin', 'sys_ptrace'];
	const others = [world.pod('ambient'), world.pod('sidecar')];
	world.writePods([podEntry(pod), ...others.map(({name, netns}) => ({name: `test/${name}`, netns, mode: name}))]);
	const start = (capabilities: readonly string[]) => world.startAgent([], ['setpriv', '--bounding-set', ['-all', ...capabilities.map(name => `+${name}`)].join(','), '--inh-caps', '-all']);
	const agent = start(needed);
	await agent.ready();
	t.is(world.json<unknown[]>('pods').length, 3);
	t.true(others[0]!.must('ip', 'rule').includes('0x111') && others[1]!.must('ip', '-6', 'addr').includes('::6/128'));
	for (const command of [['status'], ['pods'], ['map', 'list'], ['map', 'dump', 'prefixes']]) {
		const reading = run('setpriv', ['--bounding-set', '-all,+bpf', '--inh-caps', '-all', process.execPath, CLI, ...command, '--bpffs', world.bpffs]);
		t.is(reading.code, 0, `${command.join(' ')} needs CAP_BPF only: ${reading.stderr}`);
	}

	for (const [needs, command] of [['+bpf,+net_admin,+perfmon', ['explain', 'test/ambient', '--to', '10.0.0.1:80']], ['+bpf,+sys_admin,+sys_ptrace', ['sockets']]] as const) {
		const reading = run('setpriv', ['--bounding-set', `-all,${needs}`, '--inh-caps', '-all', process.execPath, CLI, ...command, '--bpffs', world.bpffs]);
		t.is(reading.code, 0, `${command.join(' ')} needs ${needs}: ${reading.stderr}`);
	}

	await agent.running.stop();
	for (const missing of ['net_admin', 'sys_admin', 'sys_ptrace']) {
		const {code, stderr} = await fails(start(needed.filter(name => name !== missing)));
		t.is(code, 1);
		t.regex(stderr, new RegExp(`this process lacks .*CAP_${missing.toUpperCase()}`));
	}
});

test('a port for metrics that is taken: the agent does not start, and leaves nothing', async t => {
	const world = World.create(t);
	world.writePods([]);
	const taken = createServer().listen(0, '127.0.0.1');
	t.teardown(() => {
		taken.close();
	});
	await once(taken, 'listening');
	const {code, stderr} = await fails(world.startAgent(['--metrics-address', `127.0.0.1:${(taken.address() as AddressInfo).port}`]));
	t.is(code, 1);
	t.regex(stderr, /metrics cannot be served \(.*EADDRINUSE.*\): choose another --metrics-address/);
	t.true(nothingIsLoaded(world));
	t.is(attached(world), 0);
});

test('a cgroup that is none is refused with a word on what to do', async t => {
	const world = World.create(t);
	world.writePods([]);
	for (const [cgroup, message] of [
		['/tmp', /\/tmp is not on cgroup v2: name a directory below .* by --cgroup/],
		[`${world.cgroup}/never-there`, /cannot be used: name an existing cgroup v2 directory by --cgroup/],
	] as const) {
		const {code, stderr} = await fails(world.startAgent(['--cgroup', cgroup]));
		t.is(code, 1);
		t.regex(stderr, message);
	}

	t.true(nothingIsLoaded(world));
});

test('a foreign directory at the pin path is left as it is', async t => {
	const world = World.create(t);
	world.writePods([]);
	mkdirSync(`${world.bpffs}/sidestep/v2/maps/cilium`, {recursive: true});
	const {code, stderr} = await fails(world.startAgent());
	t.is(code, 1);
	t.regex(stderr, /v2 was not made by sidestep \(it holds maps\/cilium\): remove it by hand/);
	t.is(attached(world), 0);
	t.true(existsSync(`${world.bpffs}/sidestep/v2/maps/cilium`));
	const unload = world.sidestep('unload');
	t.is(unload.code, 1);
	t.true(existsSync(`${world.bpffs}/sidestep/v2/maps/cilium`));
});

test('pins of another layout version are refused, by every command', async t => {
	const world = World.create(t);
	world.writePods([]);
	mkdirSync(`${world.bpffs}/sidestep/v999`, {recursive: true});
	const {code, stderr} = await fails(world.startAgent());
	t.is(code, 1);
	t.regex(stderr, /holds layout v999, and this is layout v2 of sidestep .*: there is no way back/);
	for (const command of [['status'], ['pods'], ['unload'], ['map', 'list']]) {
		const result = world.sidestep(...command);
		t.is(result.code, 1);
		t.regex(result.stderr, /holds layout v999/);
	}

	t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), ['v999']);
});

test('a pin that somebody removed is named', async t => {
	const world = World.create(t);
	const agent = await world.agent([]);
	await agent.running.stop();
	run('rm', [`${world.bpffs}/sidestep/v2/maps/prefixes`]);
	const {code, stderr} = await fails(world.startAgent());
	t.is(code, 1);
	t.regex(stderr, /v2 lacks maps\/prefixes: somebody removed pins; run `sidestep unload`/);
	t.is(world.sidestep('unload').code, 0);
	await world.agent([]);
	t.pass();
});

test('a full map: the pod that does not fit is named, the others stay, and room is used again', async t => {
	const world = World.create(t);
	const pods = ['a', 'b', 'c'].map(name => world.pod(name));
	const agent = await world.agent(pods.slice(0, 2).map(pod => podEntry(pod)), ['--max-pods', '2']);
	const before = world.json<unknown[]>('map', 'dump', 'prefixes').length;
	world.writePods(pods.map(pod => podEntry(pod)));
	await agent.says(/pod test\/c: map \w+ is full \(2 entries\): run `sidestep unload`, then start with a larger --max-pods; nothing was changed for it/);
	t.is(world.json<unknown[]>('pods').length, 2);
	t.is(world.json<unknown[]>('map', 'dump', 'prefixes').length, before, 'the lists of the pod that did not fit are gone again');
	world.writePods(pods.slice(1).map(pod => podEntry(pod)));
	await agent.ready();
	t.deepEqual(world.json<Array<{name: string}>>('pods').map(({name}) => name), ['test/b', 'test/c']);
});

test('another cgroup than the one attached to is refused', async t => {
	const world = World.create(t);
	const agent = await world.agent([]);
	await agent.running.stop();
	const {code, stderr} = await fails(world.startAgent(['--cgroup', world.subCgroup('other')]));
	t.is(code, 1);
	t.regex(stderr, /is attached to another cgroup than .*: start with the --cgroup it was started with/);
});

test('misuse of the command line ends with 2, and help works for every command', t => {
	const world = World.create(t);
	for (const args of [['nonsense'], ['run'], ['pods', '--output', 'xml'], ['map', 'dump', 'nothing'], ['run', '--pods-file', '/x', '--resync', '1'], ['map', 'dump']]) {
		const {code, stderr} = world.sidestep(...args);
		t.is(code, 2, `${args.join(' ')}: ${stderr}`);
		t.not(stderr, '');
	}

	t.regex(world.sidestep('run', '--node', '', '--bpffs', world.bpffs, '--cgroup', world.cgroup).stderr, /where are the pods to come from\?/);
	for (const command of [[], ['run'], ['check'], ['status'], ['pods'], ['map'], ['map', 'list'], ['map', 'dump'], ['unload']]) {
		const {code, stdout} = run(process.execPath, [CLI, ...command, '--help']);
		t.is(code, 0);
		t.regex(stdout, /Usage: sidestep/);
	}

});
