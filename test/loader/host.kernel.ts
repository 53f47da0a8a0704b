import {mkdirSync} from 'node:fs';
import path from 'node:path';
import test from 'ava';
import {findCgroup2, isBpffs, missingCapabilities} from '../../src/loader/host.js';
import {selfTest} from '../../src/loader/probes.js';
import {native} from '../../src/native.js';
import {run} from '../helpers/process.js';
import {CLI, World} from '../helpers/world.js';

test('cgroup v2 is found on pure and hybrid hosts', t => {
	t.is(findCgroup2('proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n'), '/sys/fs/cgroup');
	t.is(findCgroup2('tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n'), '/sys/fs/cgroup/unified');
	t.is(findCgroup2('cgroup2 /a\\040b cgroup2 rw 0 0\n'), '/a b');
	t.is(findCgroup2('cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n'), undefined);
});

test('without cgroup v2 the agent says what to do, and changes nothing', t => {
	const world = World.create(t);
	world.writePods([]);
	const {code, stderr} = run('unshare', ['-m', 'sh', '-c', 'umount "$1" && shift && exec "$@"', 'sh', findCgroup2()!, process.execPath, CLI, 'run', '--pods-file', world.podsFile, '--bpffs', world.bpffs]);
	t.is(code, 1);
	t.regex(stderr, /cgroup v2 is not mounted: mount it \(.*\), or boot with systemd\.unified_cgroup_hierarchy=1/);
	t.is(world.sidestep('unload').stdout, 'nothing is loaded\n');
});

test('the agent mounts a bpffs where there is none', async t => {
	const world = World.create(t);
	const elsewhere = path.join(world.directory, 'elsewhere');
	mkdirSync(elsewhere);
	world.writePods([]);
	const agent = world.startAgent(['--bpffs', elsewhere]);
	await agent.ready();
	t.regex(agent.running.stderr, /mounted a bpf file system at .*elsewhere/);
	t.true(isBpffs(elsewhere));
	await agent.running.stop();
	t.is(world.sidestep('unload', '--bpffs', elsewhere).code, 0);
	native.unmount(elsewhere);
});

test('the self-test captures real connections and leaves nothing attached', t => {
	const handles = native.openHandles();
	const findings = selfTest();
	t.deepEqual(findings.filter(({state}) => state === 'missing'), []);
	for (const name of ['programs', 'attach', 'capture of IPv4', 'capture of IPv6', 'capture of IPv4 on IPv6 sockets', 'refusal']) {
		t.true(findings.some(finding => finding.name === name), name);
	}

	t.regex(findings.find(({name}) => name === 'refusal')!.detail, /ENETUNREACH/);
	t.is(native.openHandles(), handles);
});

test('check tells all, as a table and as JSON, and names missing capabilities', t => {
	const world = World.create(t);
	const {code, stdout} = world.sidestep('check');
	t.is(code, 0, stdout);
	t.regex(stdout, /^NAME +STATE +DETAIL\ncapabilities +ok/);
	const findings = world.json<Array<{name: string; state: string}>>('check');
	t.true(findings.every(({state}) => state !== 'missing'));
	t.deepEqual(missingCapabilities(0n), ['CAP_NET_ADMIN', 'CAP_SYS_PTRACE', 'CAP_SYS_ADMIN', 'CAP_PERFMON', 'CAP_BPF']);
	t.deepEqual(missingCapabilities(1n << 21n), ['CAP_NET_ADMIN', 'CAP_SYS_PTRACE']);
});
