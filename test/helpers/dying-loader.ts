/** dying-loader load|unload BPFFS CGROUP STEP OBJECT: kills itself after its step of that number or name; exits with 0 if there is none. */
import {writeSync} from 'node:fs';
import {load, unload} from '../../src/loader/datapath.js';
import {takeWriterLock} from '../../src/loader/lock.js';
import {openObject} from '../../src/loader/object.js';
import {PinLayout} from '../../src/loader/paths.js';
import {TEST_MIGRATIONS} from './layouts.js';

const [what, bpffs, cgroup, dieAt, object] = process.argv.slice(2) as [string, string, string, string, string];
let steps = 0;
const onStep = (step: string) => {
	writeSync(1, `${step}\n`);
	if (++steps === Number(dieAt) || step === dieAt) {
		process.kill(process.pid, 'SIGKILL');
	}
};

const opened = openObject(object);
opened.object.close();
const lock = takeWriterLock(new PinLayout(bpffs, opened.schema.layoutVersion));
if (what === 'load') {
	load(lock, {cgroup, object, onStep, migrations: TEST_MIGRATIONS});
} else {
	unload(lock, onStep, object);
}
