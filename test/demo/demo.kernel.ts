import {readFileSync, readdirSync} from 'node:fs';
import {tmpdir} from 'node:os';
import {fileURLToPath} from 'node:url';
import test from 'ava';
import {findCgroup2} from '../../src/loader/host.js';
import {Running, must} from '../helpers/process.js';

const DEMO = fileURLToPath(new URL('../../demo/main.js', import.meta.url));

/** What a demo of this pid would leave. */
function leftovers(pid: number): readonly string[] {
	const name = `sidestep-demo-${pid}`;
	return [
		...must('ip', 'netns', 'list').split('\n'),
		...readFileSync('/proc/self/mounts', 'utf8').split('\n'),
		...readdirSync(findCgroup2()!),
		...readdirSync(tmpdir()),
	].filter(line => line.includes(name));
}

test('the demo shows capture, a killed agent and unload, and cleans up', async t => {
	const demo = Running.start(process.execPath, [DEMO]);
	t.is(await demo.ended, 0, demo.stderr);
	t.is([...demo.stdout.matchAll(/HAProxy: nothing/g)].length, 2, 'before enrolment and after unload');
	t.is([...demo.stdout.matchAll(/HAProxy: client 10\.0\.0\.2 port \d+, original destination 10\.0\.0\.3 port 8080/g)].length, 2, 'with and without an agent');
	t.is([...demo.stdout.matchAll(/sees as its peer: 10\.0\.0\.3 port 8080; itself: 10\.0\.0\.2/g)].length, 4);
	t.regex(demo.stdout, /agent: not running/);
	t.regex(demo.stdout, /redirected +2\n/);
	t.deepEqual(leftovers(demo.child.pid!), []);
});

test('the demo cleans up on Ctrl-C', async t => {
	const demo = Running.start(process.execPath, [DEMO]);
	await demo.until('the pods are there', () => demo.stdout.includes('2. The agent runs'));
	t.not(leftovers(demo.child.pid!).length, 0);
	t.is(await demo.stop('SIGINT'), 130);
	t.deepEqual(leftovers(demo.child.pid!), []);
});
