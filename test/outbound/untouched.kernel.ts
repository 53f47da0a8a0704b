import test from 'ava';
import {PROXY_MARK, PROXY_PORT, captureBySidestep, podEntry} from '../helpers/capture.js';
import {Running, run} from '../helpers/process.js';
import {World, type ClientResult} from '../helpers/world.js';

test('a namespace that is not enrolled is untouched, and no counter moves', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const enrolled = world.pod('enrolled');
	const other = world.pod('other');
	await far.server(`${far.ipv4}:8080`, `[${far.ipv6}]:8080`);
	await captureBySidestep(enrolled);
	const before = world.json('map', 'dump', 'counters');
	for (const to of [`${far.ipv4}:8080`, `[${far.ipv6}]:8080`]) {
		const result = other.client(to);
		t.is(result.outcome, 'ok');
		t.is(result.peer, to);
		t.is(result.hello!.peer, result.local, 'nothing is in between');
		t.is(result.original_dst.ip === 'ok', false);
	}

	t.deepEqual(world.json('map', 'dump', 'counters'), before);
});

test('the host\'s own connections are untouched, and no counter moves', async t => {
	const world = World.create(t);
	const enrolled = world.pod('enrolled');
	await captureBySidestep(enrolled);
	const before = world.json('map', 'dump', 'counters');
	// In the cgroup that the programs are attached to, but in the host's namespace; on loopback only.
	const onHost = (...command: string[]) => [world.program('in'), ['--cgroup', world.cgroup, '--', ...command]] as const;
	const port = 20_000 + process.pid % 10_000;
	const server = Running.start(...onHost(world.program('server'), `127.0.0.1:${port}`, `[::1]:${port}`));
	world.onEnd(async () => {
		await server.stop('SIGKILL');
	});
	await server.until('ready', () => server.stdout.includes('ready'));
	for (const to of [`127.0.0.1:${port}`, `[::1]:${port}`]) {
		const result = JSON.parse(run(...onHost(world.program('client'), '--to', to)).stdout) as ClientResult;
		t.is(result.outcome, 'ok');
		t.is(result.peer, to);
		t.is(result.hello!.peer, result.local);
	}

	t.deepEqual(world.json('map', 'dump', 'counters'), before);
});

test('a pod that leaves the pods file is plain again, and one that comes back is captured again', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await far.server(`${far.ipv4}:8080`);
	await pod.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	const agent = await captureBySidestep(pod);
	const direct = () => {
		const result = pod.client(`${far.ipv4}:8080`);
		return result.hello?.peer === result.local;
	};

	t.false(direct());
	world.writePods([]);
	await agent.says(/remove test\/pod/);
	t.true(direct());
	const mark = agent.running.stderr.length;
	world.writePods([podEntry(pod)]);
	await agent.says(/enrol test\/pod/, mark);
	t.false(direct());
	// A change of policy replaces the lists as a whole.
	world.writePods([podEntry(pod, {exempt: {uids: [0]}})]);
	await agent.says(/update test\/pod/, mark);
	t.true(direct());
	const policies = new Set(world.json<Array<{policy: number}>>('map', 'dump', 'prefixes').map(({policy}) => policy));
	t.is(policies.size, 1, 'no entry of an old policy is left');
});

test('other users of getsockopt work while attached: iptables-save, and options larger than a page', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	await captureBySidestep(pod);
	for (let index = 0; index < 300; index++) {
		pod.must('iptables-legacy', '-A', 'OUTPUT', '-p', 'udp', '--dport', String(1000 + index), '-j', 'ACCEPT');
	}

	// 300 rules are far more than the page that the kernel hands to a getsockopt program.
	t.is(pod.must('iptables-legacy-save').split('\n').filter(line => line.includes('--dport')).length, 300);
	t.is(pod.must('iptables-legacy', '-S', 'OUTPUT').split('\n').filter(line => line.includes('--dport')).length, 300);
	pod.must('iptables-nft', '-A', 'OUTPUT', '-p', 'udp', '--dport', '53', '-j', 'ACCEPT');
	t.regex(pod.must('iptables-nft-save'), /--dport 53/);
});
